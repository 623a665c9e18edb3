"""Composing the config and building stages from it."""
