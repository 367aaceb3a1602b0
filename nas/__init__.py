"""What is done with a search space: measuring, searching, exporting, reporting."""
