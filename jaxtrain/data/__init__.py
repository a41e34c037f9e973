"""Data: where examples come from, in which order they are trained on, and how they become batches."""
