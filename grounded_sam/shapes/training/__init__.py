"""Training of the small models."""
