"""Answers from a model: what is asked of it, and who answers: the built-in engine, or a server."""
