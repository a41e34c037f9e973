"""What a run reports: metrics, logs, how it spent its time, and symptoms of problems."""
