"""Data of our own: problem generators, a small training set and a tiny model that solves it."""
