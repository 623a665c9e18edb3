"""Synthetic scenes of colored shapes with exact ground truth, and the small models trained on them."""
