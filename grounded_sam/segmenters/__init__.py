"""Segmenters: boxes, clicks and masks in, masks out; one class per module."""
