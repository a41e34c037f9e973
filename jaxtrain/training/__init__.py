"""A run from its start to its result: set-up, the loop, evaluation."""
