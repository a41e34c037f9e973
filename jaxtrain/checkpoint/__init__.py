"""Checkpoints: writing and reading them, where a run goes on from, and who may write."""
