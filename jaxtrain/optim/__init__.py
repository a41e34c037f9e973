"""Optimizers, learning-rate schedules, losses, gradient clipping, and the moving average of the weights."""
