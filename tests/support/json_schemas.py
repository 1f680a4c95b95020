"""Random JSON schemas over the keywords that people use; each has instances, and short ones."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

Schema = dict[str, Any]

_WORDS = ("red", "a b", "", 'say "hi"', "tab\t", "naïve", "日本", "back\\slash", "0", "null", "😀")
_NAMES = ("name", "age", "a b", "größe", 'quo"te', "x", "items", "type", "$ref", "2")
_PATTERNS = (
    "^[a-z]{1,8}$",
    "^[A-Z][a-z]*(-[0-9]{2})?$",
    "[0-9]+x",
    "^(yes|no|perhaps)$",
    r"^\d{3}-\d{4}$",
    "^$|^[^,]{2,5}$",
    "é",
    r"^\w+@\w+\.(com|org)$",
)
_FORMATS = ("date", "time", "date-time", "email", "hostname", "ipv4", "ipv6", "uuid", "uri", "duration")


def random_schema(seed: int) -> Schema:
    """Return a schema; a seed always gives the same one."""
    return _Maker(random.Random(seed)).root()


class _Maker:
    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.definitions: Schema = {}

    def root(self) -> Schema:
        schema = self.any(depth=3)
        if self.definitions:
            return {**schema, "$defs": self.definitions}
        return schema

    def any(self, depth: int) -> Schema:
        flat: list[Callable[[], Schema]] = [self.string, self.number, self.enum, self.const, self.plain]
        nested: list[Callable[[int], Schema]] = [self.object, self.array, self.any_of, self.tuple, self.reference]
        nested += [self.object, self.all_of]
        if depth == 0 or self.rng.random() < 0.2:
            return self.rng.choice(flat)()
        return self.rng.choice(nested)(depth - 1)

    def plain(self) -> Schema:
        kinds = self.rng.sample(["boolean", "null", "integer"], self.rng.randint(1, 2))
        return {"type": kinds if len(kinds) > 1 else kinds[0], "title": "A title", "description": "Ignored."}

    def string(self) -> Schema:
        choice = self.rng.random()
        if choice < 0.3:
            return {"type": "string", "pattern": self.rng.choice(_PATTERNS)}
        if choice < 0.5:
            return {"type": "string", "format": self.rng.choice(_FORMATS)}
        least = self.rng.randint(0, 4)
        return {"type": "string", "minLength": least, "maxLength": least + self.rng.randint(0, 12)}

    def number(self) -> Schema:
        schema: Schema = {"type": self.rng.choice(["integer", "number"])}
        low = self.rng.choice([-1000, -17, 0, 3, 99])
        if self.rng.random() < 0.6:
            schema[self.rng.choice(["minimum", "exclusiveMinimum"])] = low
        if self.rng.random() < 0.6:
            schema[self.rng.choice(["maximum", "exclusiveMaximum"])] = low + self.rng.choice([2, 10, 12345])
        if self.rng.random() < 0.2:
            return {"type": "integer", "multipleOf": self.rng.choice([2, 5, 10])}
        return schema

    def value(self) -> Any:
        return self.rng.choice([*_WORDS, 0, -1, 2.5, 10**12, True, False, None, [], [1, "a"], {}, {"k": [None]}])

    def enum(self) -> Schema:
        return {"enum": [self.value() for _ in range(self.rng.randint(1, 6))]}

    def const(self) -> Schema:
        return {"const": self.value()}

    def object(self, depth: int) -> Schema:
        names = self.rng.sample(_NAMES, self.rng.randint(0, 4))
        schema: Schema = {"type": "object", "properties": {name: self.any(depth) for name in names}}
        schema["required"] = [name for name in names if self.rng.random() < 0.7]
        choice = self.rng.random()
        if choice < 0.6:
            schema["additionalProperties"] = False
        elif choice < 0.8:
            schema["additionalProperties"] = self.any(0)
        if self.rng.random() < 0.15:
            schema["patternProperties"] = {"^p_[a-z]+$": self.any(0)}
        if choice >= 0.6 and self.rng.random() < 0.3:  # llguidance counts properties only if all named ones are there
            schema["required"] = names
            schema["minProperties"] = len(names)
            schema["maxProperties"] = len(names) + 2
        return schema

    def array(self, depth: int) -> Schema:
        least = self.rng.randint(0, 2)
        return {
            "type": "array",
            "items": self.any(depth),
            "minItems": least,
            "maxItems": least + self.rng.randint(0, 3),
        }

    def tuple(self, depth: int) -> Schema:
        parts = [self.any(depth) for _ in range(self.rng.randint(1, 3))]
        return {"type": "array", "prefixItems": parts, "items": False, "minItems": len(parts)}

    def any_of(self, depth: int) -> Schema:
        return {"anyOf": [self.any(depth) for _ in range(self.rng.randint(1, 3))]}

    def all_of(self, depth: int) -> Schema:
        """An object whose properties come from two schemas."""
        first, second = self.rng.sample(_NAMES, 2)
        parts = [{"type": "object", "properties": {name: self.any(depth)}} for name in (first, second)]
        return {"allOf": parts, "required": [second]}

    def reference(self, depth: int) -> Schema:
        name = f"d{len(self.definitions)}"
        self.definitions[name] = {}  # taken, in case that what follows refers to others
        if self.rng.random() < 0.4:  # a list that ends by null
            item = self.any(0)
            self.definitions[name] = {
                "type": "object",
                "properties": {"value": item, "next": {"anyOf": [{"type": "null"}, {"$ref": f"#/$defs/{name}"}]}},
                "required": ["value", "next"],
                "additionalProperties": False,
            }
        else:
            self.definitions[name] = self.any(depth)
        return {"$ref": f"#/$defs/{name}"}
