"""The cost of a recipe, computed from its base's config alone: memory of each GPU, tokens, FLOPs, hours. No weights are loaded."""
