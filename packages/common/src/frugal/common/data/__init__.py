"""Training and evaluation data: from what a user names to batches of tensors.

``config.py`` is the part of a recipe; ``order.py`` says which sample comes when, ``stream.py``
reads it, ``sample_transform.py`` makes a batch of it. ``stores/`` holds one file per kind of store,
and ``labeled.py`` the data sets of evaluations.
"""
