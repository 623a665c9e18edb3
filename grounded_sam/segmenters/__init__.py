"""Boxes, clicks and masks to masks; one class a file."""
