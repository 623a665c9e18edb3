"""Data that travels between stages."""
