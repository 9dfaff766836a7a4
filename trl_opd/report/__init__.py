"""What people look at: the page of a folder, and the card of a student."""
