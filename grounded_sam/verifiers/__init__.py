"""Verifiers: whether a detection is what its phrase says, judged by a second model on crops."""
