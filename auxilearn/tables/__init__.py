"""The paper's tables: choose the runs, run them, write the tables."""
