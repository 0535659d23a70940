"""The paper's experiment while something changes, served."""
