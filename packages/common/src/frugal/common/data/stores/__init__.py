"""The kinds of stores that samples are read from, and how their samples are told apart.

A store hands out ``Shard`` values, whose readers give ``RawSample`` by number (``samples.py``):
tars, TFRecords, CSV lists and class folders. ``index.py`` is the side-car index of the first two;
``streamed_tar.py`` and ``url.py`` read tars that cannot be indexed.
"""
