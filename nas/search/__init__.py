"""`vitnas search`: trials, the closing run and their results."""
