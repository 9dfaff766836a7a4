"""HTML reports of output folders, and model cards of students."""
