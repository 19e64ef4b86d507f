"""CLIPA and CLIPA-v2 (arXiv:2305.07017, 2306.15658): few image and text tokens."""
