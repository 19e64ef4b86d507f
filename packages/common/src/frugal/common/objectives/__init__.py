"""Losses over the global batch, the contrastive objective, gradient caching."""
