"""The progress of a followed job in one line that fits any terminal.

It shows the phase, a bar, the step, the loss and its curve, the tokens per second, and the time left.
A narrow terminal shows fewer of these, the most useful ones longest; a wide one gets a longer bar and curve.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from zeta.cli.output import duration
from zeta.cli.sparkline import LossHistory

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions
    from rich.text import Text

GAP = "  "
MIN_BAR, MAX_BAR = 6, 40  # in columns
MIN_CURVE, MAX_CURVE = 6, 24


@dataclass(frozen=True)
class _Part:
    """One part of the line. Parts are left out in the order of ``importance``, the lowest first."""

    name: str
    text: str
    importance: int
    width: int
    max_width: int


@dataclass(frozen=True)
class Figures:
    """The newest figures of a job; ``None`` if there is none yet."""

    phase: str = "waiting"
    step: int | None = None
    total_steps: int | None = None
    share: float | None = None  # of work that has no steps
    loss: float | None = None
    tokens_per_second: float | None = None
    eta_seconds: float | None = None

    def updated(self, fields: dict[str, Any]) -> Figures:
        """The figures after a progress event. A phase without measurements keeps the previous ones."""
        given = {name: fields.get(name) for name in ("loss", "tokens_per_second", "eta_seconds")}
        return replace(
            self,
            phase=str(fields.get("phase", "")).replace("_", " "),
            step=self.step if fields.get("step") is None else fields["step"],
            total_steps=self.total_steps if fields.get("total_steps") is None else fields["total_steps"],
            share=fields.get("share"),
            **{name: value for name, value in given.items() if value is not None},
        )

    @property
    def completed_share(self) -> float | None:
        """The share of the current work that is done, from 0 to 1; ``None`` if it is unknown."""
        if self.share is not None:
            return self.share
        return self.step / self.total_steps if self.step is not None and self.total_steps else None


class ProgressDisplay:
    """A renderable of `rich` that is never wider than the console."""

    def __init__(self) -> None:
        self.figures = Figures()
        self._losses = LossHistory()

    def update(self, fields: dict[str, Any]) -> None:
        """Show the fields of a progress event."""
        self.figures = self.figures.updated(fields)
        steps = fields.get("steps") or [fields]
        for values in steps:
            if values.get("step") is not None and values.get("loss") is not None:
                self._losses.add(values["step"], values["loss"])

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        yield self.render(options.max_width, ascii_only=options.ascii_only)

    def render(self, width: int, *, ascii_only: bool = False) -> Text:
        """The line in at most ``width`` columns."""
        from rich.text import Text

        parts = _stretched(_fitting(self._parts(ascii_only), width), width)
        line = Text(no_wrap=True, overflow="crop", end="")
        for number, part in enumerate(parts):
            line.append(GAP if number else "")
            if part.name == "bar":
                done = int(part.width * min(1.0, self.figures.completed_share or 0.0))
                full, empty = ("#", "-") if ascii_only else ("━", "─")
                line.append(full * done, "green").append(empty * (part.width - done), "bright_black")
            elif part.name == "curve":
                line.append(self._losses.sparkline(part.width), "cyan")
            else:
                line.append(part.text)
        line.truncate(width)
        return line

    def _parts(self, ascii_only: bool) -> list[_Part]:
        figures = self.figures
        step = "" if figures.step is None else str(figures.step)
        if figures.step is not None and figures.total_steps is not None:
            step = f"{figures.step}/{figures.total_steps}"
        speed, left = figures.tokens_per_second, figures.eta_seconds
        curve = "" if ascii_only else self._losses.sparkline(MAX_CURVE)
        has_share = figures.completed_share is not None
        parts = [
            _text("phase", figures.phase, 4),
            _Part("bar", "-", 3, MIN_BAR, MAX_BAR) if has_share else _text("bar", "", 3),
            _text("step", step, 7),
            _text("share", "" if figures.share is None else f"{figures.share:.0%}", 8),
            _text("loss", "" if figures.loss is None else f"loss {figures.loss:.4f}", 6),
            _Part("curve", curve, 2, min(MIN_CURVE, len(curve)), len(curve)),
            _text("speed", "" if speed is None else f"{speed:,.0f} tokens/s", 1),
            _text("left", "" if left is None else f"{duration(left)} left", 5),
        ]
        return [part for part in parts if part.text]


def _text(name: str, text: str, importance: int) -> _Part:
    return _Part(name, text, importance, len(text), len(text))


def _total(parts: Sequence[_Part]) -> int:
    return sum(part.width for part in parts) + len(GAP) * max(0, len(parts) - 1)


def _fitting(parts: Sequence[_Part], width: int) -> list[_Part]:
    """The parts that fit, in their order; the most important one is always included."""
    kept = list(parts)
    while len(kept) > 1 and _total(kept) > width:
        kept.remove(min(kept, key=lambda part: part.importance))
    return kept


def _stretched(parts: Sequence[_Part], width: int) -> list[_Part]:
    """The parts with the bar and the curve widened to use the space, the narrower one first."""
    stretched = list(parts)
    for _ in range(width - _total(parts)):
        growing = [part for part in stretched if part.width < part.max_width]
        if not growing:
            break
        part = min(growing, key=lambda part: part.width)
        stretched[stretched.index(part)] = replace(part, width=part.width + 1)
    return stretched
