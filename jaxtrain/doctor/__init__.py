"""Checks of this machine, and a demonstration run."""
