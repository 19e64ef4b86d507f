"""FLIP (arXiv:2212.00794): a random part of the image patches is never encoded."""
