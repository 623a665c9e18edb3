"""Detectors: images and text, clicks or no prompt in, boxes out; one class per module."""
