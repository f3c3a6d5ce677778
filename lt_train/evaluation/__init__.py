"""Benchmarks, generation, grading and statistics: what a model can do, with its uncertainty."""
