"""Synthetic scenes of coloured shapes with exact ground truth, and the small models trained on them."""
