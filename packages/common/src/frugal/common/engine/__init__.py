"""The training loop, and DeepSpeed and Accelerate behind one interface."""
