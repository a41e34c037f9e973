"""What runs on the devices: one update, one evaluation, and the state that they change."""
