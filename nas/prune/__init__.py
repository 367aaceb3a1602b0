"""`vitnas prune`: a smaller network out of a trained one."""
