"""The points at which strategy `gates` takes gradients between full attention (0) and streaming (1)."""

import math

POINTS = ((0.5 - math.sqrt(0.15), 5 / 18), (0.5, 8 / 18), (0.5 + math.sqrt(0.15), 5 / 18))
"""(value of all gates, weight): Gauss-Legendre quadrature on [0, 1]."""
PARTS = 3
FINER_POINTS = tuple(((part + value) / PARTS, weight / PARTS) for part in range(PARTS) for value, weight in POINTS)
"""The same in each third of the path; the middle point is one of `POINTS`."""
MOST_POINTS = len({value for value, _ in (*POINTS, *FINER_POINTS)})
"""At which the gradients of one sample are taken."""
