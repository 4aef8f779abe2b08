"""Loops over any model and any kind of cache."""
