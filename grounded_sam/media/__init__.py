"""Images and videos, read and written."""
