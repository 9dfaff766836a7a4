"""Token statistics or occurrences -> rock sets."""
