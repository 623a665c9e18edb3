"""Output folders of runs."""
