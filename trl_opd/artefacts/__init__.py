"""Every file of a run or a study: its name, its format, and the checks of what comes from outside."""
