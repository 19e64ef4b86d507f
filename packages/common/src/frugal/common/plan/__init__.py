"""What a run will take before it is trained: memory, time, communication, accuracy."""
