"""Trackers: objects from frame to frame; one class per module."""
