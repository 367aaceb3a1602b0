"""From the name of a network to the network with its weights."""
