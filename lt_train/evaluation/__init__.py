"""Benchmarks, generation, grading and statistics: what a model can do, with how much doubt."""
