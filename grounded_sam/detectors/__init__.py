"""Frames and text, clicks or nothing to boxes; one class per file."""
