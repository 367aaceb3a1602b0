"""The command line: one file a verb."""

LONG = ("search", "prune", "train")
"""The verbs that train, and that go on where they were interrupted."""
