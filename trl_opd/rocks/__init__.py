"""Rock sets: their detection in token statistics or occurrences, their controls, and the families of tokens."""
