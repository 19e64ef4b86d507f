"""Towers, attention over dense and packed tokens, positions, and the model bundle."""
