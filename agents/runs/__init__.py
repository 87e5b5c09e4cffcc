"""What a run leaves on disk: its directory, its checkpoints, and classes found again by their names."""
