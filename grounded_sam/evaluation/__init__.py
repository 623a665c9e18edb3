"""Metrics of images and videos."""
