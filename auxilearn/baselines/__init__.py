"""The rivals of JTDS, a file each."""
