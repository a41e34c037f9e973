"""The optimizer and what stands around it: schedules, losses, clipping, moving average."""
