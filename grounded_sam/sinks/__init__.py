"""Where results go, one class per file."""
