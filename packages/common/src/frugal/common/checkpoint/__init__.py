"""One checkpoint format for every engine; stages that start from another's weights."""
