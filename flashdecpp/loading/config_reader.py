"""Checked access to the values of a configuration file."""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NoReturn

from flashdecpp._arguments import FLOAT32_MAX, is_integer, shown
from flashdecpp.errors import ModelError
from flashdecpp.models.config import LARGEST

REQUIRED: Any = object()  # in place of a default
EMPTY: Mapping[str, Any] = MappingProxyType({})


class ConfigReader:
    """Reads and checks values by key. A missing key and null are the same.

    source: the file as errors name it. names: the file's names of keys, if other than `prefix` and the key.
    defaults: values of missing keys, which override the caller's default.
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
        if value is not default and not (is_integer(value) and low <= value <= high):
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
        """A list of `length` finite floats above `above`."""
        values = self._get(key, REQUIRED)
        fits = isinstance(values, list) and len(values) == length
        if not fits or not all(is_number(value) and value > above for value in values):
            limit = f" above {above:g}" if math.isfinite(above) else ""
            self.refuse(key, f"a list of {length} finite numbers{limit}")
        return [float(value) for value in values]

    def token_ids(self, key: str) -> list[int]:
        """A token id or a list of them, as a list. Empty if the key is missing."""
        value = self.get(key, [])
        ids = value if isinstance(value, list) else [value]
        if not all(map(is_integer, ids)):
            self.refuse(key, "a token id or a list of token ids")
        return ids

    def mapping(self, key: str, default: Any = REQUIRED) -> Any:
        """An object, or the default."""
        value = self._get(key, default)
        if value is not default and not isinstance(value, Mapping):
            self.refuse(key, "an object")
        return value

    def section(self, key: str) -> "ConfigReader":
        """A reader of the object under `key`, empty if it is missing."""
        return ConfigReader(self.mapping(key, EMPTY), f"{self.source}, {self.name(key)}")

    def refuse(self, key: str, what: str) -> NoReturn:
        """Raises the ModelError for a value that must be `what`."""
        raise ModelError(f"{self.source}: {self.name(key)} must be {what}, got {shown(self.get(key))}")

    def _get(self, key: str, default: Any) -> Any:
        value = self.get(key, default)
        if value is REQUIRED:
            raise ModelError(f"{self.source} has no {self.name(key)}")
        return value


def is_number(value: Any) -> bool:
    """Whether it is a finite int or float, and not a bool."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False
