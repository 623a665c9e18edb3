"""Label formats, read and written."""
