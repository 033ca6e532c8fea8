"""Charts in the terminal, drawn by plotext: one curve per job, with its newest value below the chart."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from zeta.cli.output import terminal_size
from zeta.cli.wrapping import cut_end
from zeta_core.contract.errors import InvalidRequest
from zeta_core.contract.job.job import Job
from zeta_core.contract.job.responses import Curves
from zeta_core.contract.printable import printable
from zeta_core.system.settings import process_environment

X_AXES = ("step", "tokens", "epoch")
MIN_WIDTH, MIN_HEIGHT, MAX_HEIGHT = 30, 10, 24  # of the chart, in columns and lines
NUM_TICKS = 5
COLOURS = ("cyan", "magenta", "green", "orange", "blue", "red", "gray", "yellow")
SYMBOLS = ("•", "x", "o", "+", "*", "#", "@", "%")  # instead of colours, if there are several curves


@dataclass(frozen=True)
class Curve:
    """The values of one job, in the order of its steps; points without a value are left out."""

    job_id: str
    name: str | None
    x: list[float]
    y: list[float]

    @classmethod
    def of(cls, job: Job, curves: Curves, metric: str, x_axis: str) -> Curve:
        values: list[float | None] = getattr(curves, metric)
        positions: list[float | None] = getattr(curves, x_axis)
        points = [(x, y) for x, y in zip(positions, values, strict=False) if x is not None and y is not None]
        return cls(job.id, job.entity_name, [float(x) for x, _ in points], [float(y) for _, y in points])


def draw_chart(curves: Sequence[Curve], metric: str, x_axis: str, *, log_scale: bool) -> None:
    """Print a chart that fits the terminal. Raises `InvalidRequest` if no job has a value."""
    drawn = [curve for curve in curves if curve.y]
    if not drawn:
        raise InvalidRequest(
            f"No value of {metric} has been recorded yet for {', '.join(curve.job_id for curve in curves)}."
        )
    if log_scale and (lowest := min(min(curve.y) for curve in drawn)) <= 0:
        raise InvalidRequest(f"--log needs values above 0, but the lowest {metric} is {lowest:.4g}.", param="--log")
    size = terminal_size()
    width = max(MIN_WIDTH, size.columns)
    height = min(max(MIN_HEIGHT, size.lines - len(curves) - 2), MAX_HEIGHT)
    in_colour = sys.stdout.isatty() and not _is_colourless()
    for line in _chart_lines(drawn, metric, x_axis, log_scale, width, height, in_colour):
        print(line)
    for number, curve in enumerate(drawn):
        name = f"  {printable(curve.name)}" if curve.name else ""
        line = f"{curve.job_id}  {metric} {curve.y[-1]:.4g}{name}"
        left = width - len("━━ ") if sys.stdout.isatty() else len(line) * 2
        print(f"{_sample(number, len(drawn), in_colour)} {cut_end(line, left)}")
    for curve in curves:
        if not curve.y:
            print(f"  {curve.job_id}  {metric} has no value yet")


def _chart_lines(
    curves: Sequence[Curve], metric: str, x_axis: str, log_scale: bool, width: int, height: int, in_colour: bool
) -> list[str]:
    import plotext  # it has no types, and takes a third of a second to import

    figure: Any = plotext.figure  # pyright: ignore[reportAttributeAccessIssue]
    figure.clear()
    figure.theme("colorless")
    plotext.terminal.limit(False, False)  # pyright: ignore - the size of the terminal is in `width` and `height`
    figure.plot_size(width, height)
    figure.title(f"{metric}, logarithmic" if log_scale else metric)
    figure.label(x_axis)
    for number, curve in enumerate(curves):
        pixel = plotext.pixel(COLOURS[number]) if in_colour else plotext.pixel()  # pyright: ignore
        symbol = "braille" if in_colour or len(curves) == 1 else SYMBOLS[number]
        heights = [math.log10(value) for value in curve.y] if log_scale else curve.y
        signal = figure.signal(curve.x, heights, marker=plotext.marker(symbol, pixel))  # pyright: ignore
        figure.draw(signal.lines(len(curve.x) > 1))
    all_x, all_y = [x for curve in curves for x in curve.x], [y for curve in curves for y in curve.y]
    x_ticks = _even(min(all_x), max(all_x))
    if x_axis != "epoch":
        x_ticks = sorted({round(tick) for tick in x_ticks})
    figure.ruler("x").ticks(x_ticks, [f"{tick:,.6g}" for tick in x_ticks])
    if log_scale:
        y_ticks = _even(math.log10(min(all_y)), math.log10(max(all_y)))
        figure.ruler("y").ticks(y_ticks, [f"{10**tick:.4g}" for tick in y_ticks])
    else:
        y_ticks = _even(min(all_y), max(all_y))
        figure.ruler("y").ticks(y_ticks, [f"{tick:.4g}" for tick in y_ticks])
    text = str(figure.build() if in_colour else plotext.uncolorize(str(figure.build())))  # pyright: ignore
    return [line.rstrip() for line in text.rstrip("\n").split("\n")]


def _even(low: float, high: float) -> list[float]:
    """Ticks at equal distances."""
    return [low + (high - low) * number / (NUM_TICKS - 1) for number in range(NUM_TICKS)] if high > low else [low]


def _sample(number: int, count: int, in_colour: bool) -> str:
    if not in_colour:
        return SYMBOLS[number] if count > 1 else "•"
    import plotext

    return str(plotext.colorize("━━", plotext.pixel(COLOURS[number])))  # pyright: ignore


def _is_colourless() -> bool:
    """Whether the user wants no colours (https://no-color.org), or the terminal has none."""
    variables = process_environment()
    return bool(variables.get("NO_COLOR")) or variables.get("TERM") in ("dumb", "unknown")
