"""MILAN (arXiv:2208.06049): masked autoencoding towards the features of a CLIP model."""
