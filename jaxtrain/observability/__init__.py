"""What a run tells: metrics, logs, where its time went, what is not as it should be."""
