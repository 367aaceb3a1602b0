"""From a network to the files that runtimes load."""
