"""Frames and words (or clicks, or nothing) to boxes; one class a file."""
