"""What a run leaves behind: checkpoints, the student, its record."""
