"""A row of small bars that shows how a value has changed, such as ``█▆▄▃▂▂▁``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

LEVELS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float], width: int) -> str:
    """At most ``width`` bars from the lowest to the highest value; each is the mean of an equal share of the values.

    Values that are not finite are left out.
    """
    finite = [value for value in values if math.isfinite(value)]
    if not finite or width <= 0:
        return ""
    means = _means(finite, min(width, len(finite)))
    low, high = min(means), max(means)
    if high == low:
        return LEVELS[0] * len(means)
    return "".join(LEVELS[min(int((mean - low) / (high - low) * len(LEVELS)), len(LEVELS) - 1)] for mean in means)


def _means(values: Sequence[float], count: int) -> list[float]:
    edges = [index * len(values) // count for index in range(count + 1)]
    return [math.fsum(values[start:end]) / (end - start) for start, end in pairwise(edges)]


class LossHistory:
    """The losses of a job by step, in bounded memory: of a long job, only losses some steps apart are kept."""

    MAX_POINTS = 2000

    def __init__(self) -> None:
        self._points: list[tuple[int, float]] = []
        self._min_distance = 1  # in steps

    def add(self, step: int, loss: float) -> None:
        """Add a loss. A step that is not new belongs to an attempt that resumed, and replaces the later ones."""
        while self._points and self._points[-1][0] >= step:
            self._points.pop()
        self._keep(step, loss)
        while len(self._points) > self.MAX_POINTS:
            self._min_distance *= 2
            points, self._points = self._points, []
            for point in points:
                self._keep(*point)

    def _keep(self, step: int, loss: float) -> None:
        if not self._points or step - self._points[-1][0] >= self._min_distance:
            self._points.append((step, loss))

    def sparkline(self, width: int) -> str:
        """The losses as at most ``width`` bars, each for an equal share of the steps."""
        return sparkline(self._even(width), width) if self._points else ""

    def _even(self, width: int) -> list[float]:
        """The mean loss of each share of the steps; a share without a loss repeats the one before."""
        count = min(width, len(self._points))
        first, last = self._points[0][0], self._points[-1][0]
        shares: list[list[float]] = [[] for _ in range(count)]
        for step, loss in self._points:
            shares[(step - first) * count // (last - first + 1)].append(loss)
        means: list[float] = []
        for share in shares:
            means.append(math.fsum(share) / len(share) if share else means[-1])
        return means

    def __len__(self) -> int:
        return len(self._points)
