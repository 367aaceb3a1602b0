"""The kit that all reports use: pages, figures, tables."""
