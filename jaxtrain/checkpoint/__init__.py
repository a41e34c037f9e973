"""Checkpoints: how they are written and read, where a run resumes, and which run may write."""
