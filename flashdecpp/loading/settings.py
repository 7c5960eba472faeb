"""The values of a configuration file, each checked as it is read."""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from flashdecpp._arguments import FLOAT32_MAX
from flashdecpp.errors import ModelError
from flashdecpp.models.config import LARGEST

REQUIRED: Any = object()  # in place of a default
EMPTY: Mapping[str, Any] = MappingProxyType({})


class Settings:
    """Values by key; null and a key that isn't there are the same.

    source: what errors call the file. names: what the file calls a key, where it isn't the key itself behind
    `prefix`. defaults: of keys that the file lacks, whatever the caller's default is.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        source: str,
        names: Mapping[str, str] = EMPTY,
        defaults: Mapping[str, Any] = EMPTY,
        prefix: str = "",
    ) -> None:
        self.values, self.source = values, source
        self._names, self._defaults, self._prefix = names, defaults, prefix

    def name(self, key: str) -> str:
        return self._names.get(key, self._prefix + key)

    def get(self, key: str, default: Any = None) -> Any:
        """The value, unchecked."""
        value = self.values.get(self.name(key))
        return self._defaults.get(key, default) if value is None else value

    def integer(self, key: str, default: Any = REQUIRED, *, low: int = 1, high: int = LARGEST) -> Any:
        """An int from `low` to `high`, or the default."""
        value = self._get(key, default)
        if value is not default and not (_is_integer(value) and low <= value <= high):
            self.refuse(key, f"an integer from {low} to {high}")
        return value

    def number(
        self,
        key: str,
        default: Any = REQUIRED,
        *,
        above: float = -math.inf,
        low: float = -math.inf,
        high: float = math.inf,
    ) -> Any:
        """A float32 above `above` and from `low` to `high`, or the default."""
        value = self._get(key, default)
        if value is default:
            return value
        if is_number(value) and abs(value) > FLOAT32_MAX:
            self.refuse(key, "a number that float32 holds")
        if not (is_number(value) and value > above and low <= value <= high):
            bounds = (("above", above), ("at least", low), ("at most", high))
            limits = [f"{word} {limit:g}" for word, limit in bounds if math.isfinite(limit)]
            self.refuse(key, " ".join(["a finite number", " and ".join(limits)]).strip())
        return float(value)

    def flag(self, key: str, default: Any = REQUIRED) -> Any:
        """A bool, or the default."""
        value = self._get(key, default)
        if value is not default and not isinstance(value, bool):
            self.refuse(key, "true or false")
        return value

    def text(self, key: str, default: Any = REQUIRED) -> Any:
        """A str, or the default."""
        value = self._get(key, default)
        if value is not default and not isinstance(value, str):
            self.refuse(key, "a string")
        return value

    def numbers(self, key: str, length: int, *, above: float = -math.inf) -> list[float]:
        """A list of finite floats above `above`."""
        values = self._get(key, REQUIRED)
        right = isinstance(values, list) and len(values) == length
        if not right or not all(is_number(value) and value > above for value in values):
            limit = f" above {above:g}" if math.isfinite(above) else ""
            self.refuse(key, f"a list of {length} finite numbers{limit}")
        return [float(value) for value in values]

    def token_ids(self, key: str) -> list[int]:
        """One token id or several; none where the key is missing."""
        value = self.get(key, [])
        ids = value if isinstance(value, list) else [value]
        if not all(map(_is_integer, ids)):
            self.refuse(key, "a token id or a list of token ids")
        return ids

    def mapping(self, key: str, default: Any = REQUIRED) -> Any:
        """An object of its own, or the default."""
        value = self._get(key, default)
        if value is not default and not isinstance(value, Mapping):
            self.refuse(key, "an object")
        return value

    def section(self, key: str) -> "Settings":
        """The values of an object; of an empty one where there is none."""
        return Settings(self.mapping(key, EMPTY), f"{self.source}, {self.name(key)}")

    def refuse(self, key: str, what: str) -> None:
        """Raises the ModelError for a value that is not `what` it must be."""
        raise ModelError(f"{self.source}: {self.name(key)} must be {what}, got {_shown(self.get(key))}")

    def _get(self, key: str, default: Any) -> Any:
        value = self.get(key, default)
        if value is REQUIRED:
            raise ModelError(f"{self.source} has no {self.name(key)}")
        return value


def is_number(value: Any) -> bool:
    """Whether it is a finite int or float; a bool is neither."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    """A value as an error quotes it: in one line, and not all of it where it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # integers of thousands of digits, lists in lists
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."
