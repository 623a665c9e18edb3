"""Where results go; one class a file."""
