"""File formats: labels of images and videos, and the store of results."""
