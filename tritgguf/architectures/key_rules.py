"""What a rule is: it pairs an entry of config.json with the GGUF key that says the same.

A model's configuration is a sequence of rules (`Architecture.rules`), and each knows both directions: `to_gguf` returns
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
    from tritgguf.architectures.dimensions import Dimensions
    from tritgguf.architectures.table import Architecture


@dataclass(frozen=True)
class HfConfig:
    """A config.json, its family and its sizes."""

    entries: Mapping[str, Any]
    architecture: Architecture
    dimensions: Dimensions
    where: str

    def default(self, entry: str, otherwise: Any = None) -> Any:
        """Return what the family means where config.json leaves an entry out."""
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
        """Return the value of a key, which is named without its architecture."""
        return self.metadata.get(f"{self.architecture.gguf_name}.{key}", default)

    def number(self, key: str, default: float | None = None, *, whole: bool = False) -> Any:
        """Return a number above zero; TritGgufError when the key is missing or none."""
        name, value = f"{self.architecture.gguf_name}.{key}", self.get(key, default)
        if value is None:
            raise TritGgufError(f"{self.where}: the key {name} is missing")
        if whole:
            return count_of({name: value}, name, self.where)
        positive_number(value, name, self.where)
        return value


class Rule(Protocol):
    """A part of a model's configuration, in both directions."""

    def to_gguf(self, config: HfConfig, /) -> Mapping[str, int | float | str]:
        """Return GGUF keys, without their architecture; TritGgufError for what is impossible or not supported.

        A whole number becomes a UINT32, any other a FLOAT32.
        """

    def to_hf(self, keys: GgufKeys, /) -> Mapping[str, Any]:
        """Return entries of config.json; TritGgufError for keys that are missing or impossible."""


def _always(_: HfConfig) -> bool:
    return True


@dataclass(frozen=True)
class SizeRule:
    """A size, which config.json, GGUF and `Dimensions` have under different names."""

    size: str
    """The field of `Dimensions`."""
    hf: str
    gguf: str
    most: int | None = None
    when: Callable[[HfConfig], bool] = _always
    """Whether the key is written."""

    def in_config(self, entries: Mapping[str, Any], architecture: Architecture, where: str, default: Any = None) -> int:
        """Return the size that a config.json states; without it the family's default, or else `default`."""
        default = architecture.defaults.get(self.hf, default)
        return count_of(entries, self.hf, where, default=default, **self._limit())

    def in_gguf(self, metadata: Mapping[str, Any], architecture: Architecture, where: str, default: Any = None) -> int:
        """Return the size that GGUF's keys state."""
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
    """How a number of config.json becomes a number of GGUF, and back."""

    to_gguf: Callable[[Any, HfConfig], int | float | None]
    """None: the key is not written."""
    to_hf: Callable[[Any, GgufKeys], Any]
    """Takes None where the key is missing."""


SAME = Transform(lambda number, _: number, lambda number, _: shortest_decimal(number))


@dataclass(frozen=True)
class KeyRule:
    """A number above zero that is one entry of config.json and one key of GGUF."""

    hf: str
    gguf: str
    default: float | None = None
    """What config.json means where it leaves the entry out, unless the family's `defaults` say otherwise."""
    absent: float | None = None
    """What GGUF means where it leaves the key out."""
    transform: Transform = SAME
    whole: bool = False
    required: bool = False
    """Whether GGUF must have the key."""
    nullable: bool = False
    """Whether config.json may say null: there is no such number."""

    def to_gguf(self, config: HfConfig) -> dict[str, int | float | str]:
        """Return the number under its GGUF key; nothing for null and for what the transform leaves out."""
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
        """Return the number under its entry of config.json, with null where GGUF has none."""
        value = keys.get(self.gguf, self.absent)
        if value is not None or self.required:
            value = keys.number(self.gguf, self.absent, whole=self.whole)
        return {self.hf: self.transform.to_hf(value, keys)}


def _nothing(_: HfConfig | GgufKeys) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class SpecialRule:
    """What is more than a number: several keys at once, facts that GGUF keeps in tensors, checks of one side."""

    to_gguf: Callable[[HfConfig], Mapping[str, int | float | str]] = _nothing
    to_hf: Callable[[GgufKeys], Mapping[str, Any]] = _nothing
