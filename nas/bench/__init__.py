"""`vitnas bench`: networks timed side by side, and the papers' claims checked."""
