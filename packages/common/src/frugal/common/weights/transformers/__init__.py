"""transformers: its folders as models of ours, and ours as folders of its many models."""
