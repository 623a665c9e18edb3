"""Model weights: the hub, its cache, loading and conversion."""
