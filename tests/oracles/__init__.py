"""Slow, obviously right versions of what the product does fast."""
