"""Joint task and data scheduling for auxiliary learning (JTDS; Chen et al., ICML 2022)."""
