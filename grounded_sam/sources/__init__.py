"""Where frames come from; one class per file."""
