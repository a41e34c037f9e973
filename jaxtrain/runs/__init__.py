"""What the files of runs say: series of metrics, and what several runs have in common and in what they differ."""
