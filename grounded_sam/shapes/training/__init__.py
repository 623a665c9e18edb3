"""Training of the small models on synthetic scenes."""
