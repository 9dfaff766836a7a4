"""What one does with a student beside training it."""
