"""Checks of user arguments: the error names the argument, the result has one of Python's own types."""

import math
import reprlib
from numbers import Integral, Real
from typing import Any

from .errors import ModelError

INT32_MAX = 2**31 - 1
FLOAT32_MAX = 3.4028234663852886e38
FLOAT32_SMALLEST = 1.1754943508222875e-38  # normal: no device flushes it to 0

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = 60


def shown(value: object) -> str:
    """A value as errors quote it: on one line and shortened if it is long."""
    try:
        return " ".join(_repr.repr(value).split())
    except ValueError:  # an integer with more digits than Python prints
        return f"a huge {type(value).__name__}"


def require(condition: bool, name: str, what: str, value: object) -> None:
    """Raises a ModelError, "`name` must be `what`, got `value`", unless the condition holds."""
    if not condition:
        raise ModelError(f"{name} must be {what}, got {shown(value)}")


def is_integer(value: object) -> bool:
    """Whether it is an integer of Python or numpy, and not a bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def integer(name: str, value: Any, low: int, high: int | None = None) -> int:
    """The value as an int. ModelError unless it is an integer from `low` to `high`."""
    require(is_integer(value), name, "an integer", value)
    require(value >= low, name, f"{low} or more", value)
    require(high is None or value <= high, name, f"at most {high}", value)
    return int(value)


def number(
    name: str, value: Any, low: float = -math.inf, high: float = math.inf, *, above: float = -math.inf
) -> float:
    """The value as a float. ModelError unless it is within float32's range and the given bounds.

    A value that float32 would flush to 0 becomes the smallest normal one, so that nothing divides by 0.
    """
    real = isinstance(value, Real) and not isinstance(value, bool)
    try:
        wide = float(value) if real else math.nan
    except OverflowError:  # an integer
        wide = math.inf
    require(abs(wide) <= FLOAT32_MAX, name, "a finite number (of float32)", value)
    require(wide > above, name, f"above {above:g}", value)
    require(wide >= low, name, f"{low:g} or more", value)
    require(wide <= high, name, f"at most {high:g}", value)
    return math.copysign(FLOAT32_SMALLEST, wide) if 0 < abs(wide) < FLOAT32_SMALLEST else wide


def flag(name: str, value: Any) -> bool:
    """The value. ModelError unless it is a bool."""
    require(isinstance(value, bool), name, "True or False", value)
    return value
