"""Numbers, sizes, durations and times as people read them; the filters of the templates."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

from markupsafe import Markup

from zeta_core.contract.job.events import utc_now

MISSING = "–"
_SIZE_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def as_bytes(num_bytes: float | None) -> str:
    """A size with a binary unit, such as ``1.5 MiB``."""
    if num_bytes is None:
        return MISSING
    value, unit = float(num_bytes), 0
    while value >= 1024 and unit < len(_SIZE_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.0f} {_SIZE_UNITS[unit]}" if unit == 0 or value >= 100 else f"{value:.1f} {_SIZE_UNITS[unit]}"


def as_count(number: float | None) -> str:
    """A number with separators; a large one is abbreviated, such as ``135 M``."""
    if number is None:
        return MISSING
    for limit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if abs(number) >= limit:
            return f"{number / limit:.3g} {letter}"
    return f"{number:,.0f}" if abs(number) >= 100 or float(number).is_integer() else f"{number:.4g}"


def as_number(number: float | None, digits: int = 4) -> str:
    """A measured value with some significant digits."""
    if number is None:
        return MISSING
    return f"{number:.{digits}g}"


def as_percent(share: float | None) -> str:
    """A share of 1 as a percentage without decimals."""
    return MISSING if share is None else f"{100 * share:.0f} %"


def as_duration(seconds: float | None) -> str:
    """A duration in its two largest units, such as ``1 h 5 min``."""
    if seconds is None:
        return MISSING
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes < 10 and rest else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h" if hours else f"{days} d"


def as_time(moment: datetime | None) -> Markup:
    """A ``time`` element with the age of a moment; the browser's script keeps the age current."""
    if moment is None:
        return Markup(MISSING)  # noqa: S704 - a constant
    age = (utc_now() - moment).total_seconds()
    text = "just now" if age < 5 else f"{as_duration(age).split(' min')[0]} min ago" if 60 <= age < 3600 else None
    text = text or f"{as_duration(age)} ago"
    exact = f"{moment:%Y-%m-%d %H:%M:%S} UTC"
    return Markup('<time datetime="{}" title="{}">{}</time>').format(moment.isoformat(), exact, text)


def as_prose(text: str) -> Markup:
    """A sentence of the service, whose commands in backquotes become code."""
    parts = text.split("`")
    return Markup("").join(Markup("<code>{}</code>").format(part) if n % 2 else part for n, part in enumerate(parts))


def as_clock(moment: datetime | None) -> str:
    """The time of day in UTC."""
    return MISSING if moment is None else f"{moment:%H:%M:%S}"


def as_json(value: Any) -> str:
    """A value as compact JSON, for settings; strings without quotes."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def as_token(text: str) -> str:
    """The text of a token with visible white space, quoted like a JSON string."""
    return json.dumps(text, ensure_ascii=False)


FILTERS = {
    "bytes": as_bytes,
    "count": as_count,
    "number": as_number,
    "percent": as_percent,
    "duration": as_duration,
    "age": as_time,
    "clock": as_clock,
    "prose": as_prose,
    "as_json": as_json,
    "as_token": as_token,
}
