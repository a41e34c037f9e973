"""What a run tells: records for programs, a log and a progress bar for people, and where the time went."""
