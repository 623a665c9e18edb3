"""Masks followed from frame to frame; one class a file."""
