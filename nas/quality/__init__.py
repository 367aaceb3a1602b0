"""Quality tiers: an Arch becomes an estimate of its accuracy, with its error. One file a tier."""
