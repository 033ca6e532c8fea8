"""Durations as options of commands, such as ``90d`` or ``3h55m``."""

from __future__ import annotations

import re

_UNIT_SECONDS = {"m": 60, "h": 3600, "d": 24 * 3600, "w": 7 * 24 * 3600}
_PART = re.compile(r"([0-9]{1,6})([mhdw])")


def seconds_of(text: str, option: str) -> int:
    """The seconds of a duration in weeks, days, hours and minutes, such as ``2w`` or ``3h55m``.

    Raises `InvalidRequest`, which names the option.
    """
    from zeta_core.contract.errors import InvalidRequest

    parts = _PART.findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise InvalidRequest(
            f"{option} is {text!r}; it must be a duration such as 30m, 12h, 3h55m, 90d or 2w.", param=option
        )
    return sum(int(number) * _UNIT_SECONDS[unit] for number, unit in parts)
