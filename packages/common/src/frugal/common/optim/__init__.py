"""Optimizers and learning-rate schedules, each with its configuration."""
