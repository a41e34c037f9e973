"""The compiled work of a run: the train step, the evaluation step, and the state."""
