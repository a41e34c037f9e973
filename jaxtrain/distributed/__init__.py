"""Processes of one run: how they find each other, what they do together, and how they end together."""
