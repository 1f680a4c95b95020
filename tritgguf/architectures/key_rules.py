"""Rule classes, which map entries of config.json to GGUF keys and back.

A model's configuration is a sequence of rules (`Architecture.rules`). Each works in both directions: `to_gguf` returns
GGUF keys for a config.json, `to_hf` returns entries of config.json for GGUF keys. The rules themselves are in `keys`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from tritgguf.errors import TritGgufError
from tritgguf.formats.checked import count_of, positive_number
from tritgguf.formats.dtypes import shortest_decimal

if TYPE_CHECKING:
    from tritgguf.architectures.architecture import Architecture
    from tritgguf.architectures.dimensions import Dimensions


GgufValue = int | float | str | list[int] | list[bool]


@dataclass(frozen=True)
class HfConfig:
    """A config.json, its family and its sizes."""

    entries: Mapping[str, Any]
    architecture: Architecture
    dimensions: Dimensions
    where: str

    def default(self, entry: str, otherwise: Any = None) -> Any:
        """Return the family's default for an entry that config.json lacks."""
        return self.architecture.defaults.get(entry, otherwise)

    def get(self, entry: str, otherwise: Any = None) -> Any:
        """Return an entry, or its default."""
        return self.entries.get(entry, self.default(entry, otherwise))


@dataclass(frozen=True)
class GgufKeys:
    """The keys of a GGUF model, the names of its tensors, its family and its sizes."""

    metadata: Mapping[str, Any]
    tensors: Collection[str]
    architecture: Architecture
    dimensions: Dimensions
    where: str

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of a key; `key` lacks the architecture prefix."""
        return self.metadata.get(f"{self.architecture.gguf_name}.{key}", default)

    def number(self, key: str, default: float | None = None, *, whole: bool = False) -> Any:
        """Return a positive number; TritGgufError if the key is missing or has another value."""
        name, value = f"{self.architecture.gguf_name}.{key}", self.get(key, default)
        if value is None:
            raise TritGgufError(f"{self.where}: the key {name} is missing")
        if whole:
            return count_of({name: value}, name, self.where)
        positive_number(value, name, self.where)
        return value


class Rule(Protocol):
    """A part of a model's configuration, in both directions."""

    def to_gguf(self, config: HfConfig, /) -> Mapping[str, GgufValue]:
        """Return GGUF keys without the architecture prefix; TritGgufError for impossible or unsupported entries.

        An int becomes a UINT32, a bool a BOOL, a float a FLOAT32, a list an array of INT32 or BOOL.
        """

    def to_hf(self, keys: GgufKeys, /) -> Mapping[str, Any]:
        """Return entries of config.json; TritGgufError for keys that are missing or impossible."""


def _always(_: HfConfig) -> bool:
    return True


@dataclass(frozen=True)
class SizeRule:
    """A size, with its names in config.json, GGUF and `Dimensions`."""

    size: str
    """The field of `Dimensions`."""
    hf: str
    gguf: str
    most: int | None = None
    when: Callable[[HfConfig], bool] = _always
    """Whether to write the key."""

    def in_config(self, entries: Mapping[str, Any], architecture: Architecture, where: str, default: Any = None) -> int:
        """Return the size in a config.json, otherwise the family's default, otherwise `default`."""
        default = architecture.defaults.get(self.hf, default)
        return count_of(entries, self.hf, where, default=default, **self._limit())

    def in_gguf(self, metadata: Mapping[str, Any], architecture: Architecture, where: str, default: Any = None) -> int:
        """Return the size in GGUF's keys, otherwise `default`."""
        return count_of(metadata, f"{architecture.gguf_name}.{self.gguf}", where, default=default, **self._limit())

    def to_gguf(self, config: HfConfig) -> dict[str, int | float | str]:
        """Return the size under its GGUF key."""
        return {self.gguf: getattr(config.dimensions, self.size)} if self.when(config) else {}

    def to_hf(self, keys: GgufKeys) -> dict[str, Any]:
        """Return the size under its entry of config.json."""
        return {self.hf: getattr(keys.dimensions, self.size)}

    def _limit(self) -> dict[str, int]:
        return {} if self.most is None else {"most": self.most}


@dataclass(frozen=True)
class Transform:
    """Conversion of a number between config.json and GGUF."""

    to_gguf: Callable[[Any, HfConfig], int | float | None]
    """Returns None if the key is not written."""
    to_hf: Callable[[Any, GgufKeys], Any]
    """Receives None if the key is missing."""


SAME = Transform(lambda number, _: number, lambda number, _: shortest_decimal(number))


@dataclass(frozen=True)
class KeyRule:
    """A positive number that is one entry of config.json and one GGUF key."""

    hf: str
    gguf: str
    default: float | None = None
    """The value if config.json lacks the entry; the family's `defaults` take precedence."""
    absent: float | None = None
    """The value if GGUF lacks the key."""
    transform: Transform = SAME
    whole: bool = False
    required: bool = False
    """Whether the GGUF key is mandatory."""
    nullable: bool = False
    """Whether the entry of config.json may be null; then GGUF has no key."""

    def to_gguf(self, config: HfConfig) -> dict[str, int | float | str]:
        """Return the number under its GGUF key; nothing if it is null or the transform returns None."""
        value = config.get(self.hf, self.default)
        if value is None and self.nullable:
            return {}
        if self.whole:
            default = config.default(self.hf, self.default)
            number: float = count_of(config.entries, self.hf, config.where, default=default)
        else:
            number = positive_number(value, self.hf, config.where)
        written = self.transform.to_gguf(number, config)
        return {} if written is None else {self.gguf: written}

    def to_hf(self, keys: GgufKeys) -> dict[str, Any]:
        """Return the number under its entry of config.json; null if GGUF has no key."""
        value = keys.get(self.gguf, self.absent)
        if value is not None or self.required:
            value = keys.number(self.gguf, self.absent, whole=self.whole)
        return {self.hf: self.transform.to_hf(value, keys)}


def _nothing(_: HfConfig | GgufKeys) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class SpecialRule:
    """A rule that is not a single number: several keys, information in GGUF tensors, checks of one direction."""

    to_gguf: Callable[[HfConfig], Mapping[str, GgufValue]] = _nothing
    to_hf: Callable[[GgufKeys], Mapping[str, Any]] = _nothing
