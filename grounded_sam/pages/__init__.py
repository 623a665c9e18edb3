"""HTML pages: the base that all of them extend, and those that are opened from disk."""
