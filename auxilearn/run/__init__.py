"""One training run: its configuration, what it is built of, and what it leaves on disk."""
