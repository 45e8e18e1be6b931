"""Decode attention over packed low-bit keys and values."""
