"""What of this machine would keep a run from working; and a demonstration that proves that it works."""
