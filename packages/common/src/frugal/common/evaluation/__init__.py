"""What a model is measured on, and what is kept of the results."""
