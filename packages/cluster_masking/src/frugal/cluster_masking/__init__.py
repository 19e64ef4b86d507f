"""Cluster Masking (arXiv:2405.08815): clusters of similar patches are left out."""
