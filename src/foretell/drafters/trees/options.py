"""Reading the options of trees."""

from __future__ import annotations

from foretell.core.errors import InputError


def at_least_one(name: str, **values: int) -> None:
    """InputError for the first of `values` that is below 1."""
    for key, value in values.items():
        if value < 1:
            raise InputError(f"tree={name} needs {key} >= 1, not {value}.")


def whole(name: str, key: str, text: str) -> list[int]:
    """'3/2/1' -> [3, 2, 1], all at least 1."""
    try:
        values = [int(x) for x in str(text).split("/")]
    except ValueError:
        values = [0]
    if min(values) < 1:
        raise InputError(
            f"tree={name},{key}={text}: write whole numbers from 1 up with slashes between them, "
            "one for each level, for example 3/2/1."
        )
    return values


def numbers(name: str, key: str, text: str, most: float = float("inf")) -> list[float]:
    """'0.6/0.2' -> [0.6, 0.2], all in 0..most."""
    try:
        values = [float(x) for x in str(text).split("/")]
    except ValueError:
        values = [-1.0]
    if not all(0 <= v <= most for v in values):
        limit = "" if most == float("inf") else f" and at most {most:g}"
        raise InputError(
            f"tree={name},{key}={text}: write numbers that are not negative{limit}, with slashes "
            "between them, for example 0.6/0.2/0.1."
        )
    return values
