"""`vitnas train`, and the engine and recipes of every training."""
