"""CiT (arXiv:2301.02241): data are chosen during training by what a task is about."""
