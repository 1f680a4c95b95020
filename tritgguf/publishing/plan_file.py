"""PLAN.toml: what `publish` makes. Whatever is wrong in it is one line that names file, table and key."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from tritgguf.errors import BadRequestError, MissingExtraError, TritGgufError
from tritgguf.exporters.export import FORMATS
from tritgguf.formats.file_kinds import is_hub_id
from tritgguf.formats.text_file import read_text
from tritgguf.publishing.configurations import BUILT_IN, Configuration
from tritgguf.text_format import parse_bytes

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_MOST_NAME = 96  # letters of a repository's name on the hub
Table = Mapping[str, Any]
Named = TypeVar("Named", "PlannedSource", Configuration)
_NUMBER = (int, float)
_BOOL_OR_TEXT = (bool, str)
_CONFIGURATION_KEYS = {
    "name": str,
    "depth": int,
    "output_depth": int,
    "embedding_depth": int,
    "recipe": str,
    "encoder": str,
    "tune": _BOOL_OR_TEXT,
    "keep": str,
    "target_bpw": _NUMBER,
    "target_size": str,
    "sensitivity": _NUMBER,
}
_PUBLISH_KEYS = {"output": str, "text": str, "tokens": int, "exports": list, "bench": bool}
_CALIBRATION_KEYS = {"text": str, "tokens": int, "seed": int}
_CLUSTER_KEYS = {"disk": str}
_DISKS = ("shared", "node")
_TYPE_NAMES = {
    str: "a text",
    int: "a whole number",
    bool: "true or false",
    list: "a list",
    _NUMBER: "a number",
    _BOOL_OR_TEXT: "true, false or a text",
}


@dataclass(frozen=True)
class PlannedSource:
    """A source: its folder, file or hub id, and the name that its files begin with."""

    location: str
    name: str


@dataclass(frozen=True)
class Calibration:
    """The text for encoders and sensitivities: a file, or what the model writes itself; None: the default length."""

    text: Path | None = None
    tokens: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class PublishPlan:
    """What is to be made.

    Attributes:
        file: the plan's own path.
        sources, configurations: each source is made in each configuration.
        output: folder of the results.
        text: path of the text to evaluate on; None for the one in the package.
        tokens: how many of its tokens are evaluated.
        exports: formats of `export`.
        bench: whether speed is measured.
        calibration: the text for what is calibrated.
        shared_disk: whether the nodes of a cluster share the disk with output and sources; else each has its own.

    """

    file: Path
    sources: tuple[PlannedSource, ...]
    configurations: tuple[Configuration, ...]
    output: Path
    text: Path | None = None
    tokens: int = 512
    exports: tuple[str, ...] = ()
    bench: bool = True
    calibration: Calibration = field(default_factory=Calibration)
    shared_disk: bool = True


def read_plan(file: Path) -> PublishPlan:
    """Read a plan; paths in it are relative to its folder.

    Raises TritGgufError for what is not TOML, unknown keys, wrong types, impossible options and missing files.
    """
    content = _parse(file)
    fail = partial(_fail, file)
    for key in content:
        if key not in ("sources", "configurations", "publish", "calibration", "cluster"):
            raise fail("", key, "is unknown; a plan has sources, configurations, publish, calibration and cluster")
    settings = _table(file, content, "publish", _PUBLISH_KEYS)
    calibration = _table(file, content, "calibration", _CALIBRATION_KEYS)
    if "output" not in settings:
        raise fail("publish", "output", "is missing; name the folder for the results")
    exports = settings.get("exports", [])
    for name in exports:
        if name not in FORMATS:
            raise fail("publish", "exports", f"has {name!r}; choose from {', '.join(FORMATS)}")
    disk = _table(file, content, "cluster", _CLUSTER_KEYS).get("disk", _DISKS[0])
    if disk not in _DISKS:
        raise fail("cluster", "disk", f"is {disk!r}; choose from {', '.join(_DISKS)}")
    _at_least(file, "publish", settings, "tokens", 2)
    _at_least(file, "calibration", calibration, "tokens", 1)
    _at_least(file, "calibration", calibration, "seed", 0)
    return PublishPlan(
        file,
        _entries(file, content, "sources", _source),
        _entries(file, content, "configurations", _configuration),
        file.parent / settings["output"],
        _text(file, "publish", settings),
        settings.get("tokens", 512),
        tuple(dict.fromkeys(exports)),
        settings.get("bench", True),
        Calibration(_text(file, "calibration", calibration), calibration.get("tokens"), calibration.get("seed", 0)),
        disk == "shared",
    )


def _parse(file: Path) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        try:
            import tomli as tomllib
        except ImportError as error:
            raise MissingExtraError(
                f"{file}: reading TOML needs tomli with this Python; install it: pip install tomli"
            ) from error
    try:
        return tomllib.loads(read_text(file))
    except tomllib.TOMLDecodeError as error:
        raise BadRequestError(f"{file}: is no TOML: {error}") from error


def _fail(file: Path, table: str, key: str, what: str) -> BadRequestError:
    """Return the error about a key."""
    where = f"[{table}] " if table else ""
    return BadRequestError(f"{file}: {where}{key}: {what}")


def _table(file: Path, content: Table, name: str, keys: Mapping[str, Any]) -> dict[str, Any]:
    table = content.get(name, {})
    if not isinstance(table, dict):
        raise _fail(file, "", name, "must be a table")
    return _checked(file, name, table, keys)


def _checked(file: Path, where: str, table: dict[str, Any], keys: Mapping[str, Any]) -> dict[str, Any]:
    """Return a table whose keys are all known and have the right types."""
    for key, value in table.items():
        if key not in keys:
            raise _fail(file, where, key, f"is unknown; choose from {', '.join(keys)}")
        wanted = keys[key]
        if not isinstance(value, wanted) or (isinstance(value, bool) and wanted not in (bool, _BOOL_OR_TEXT)):
            raise _fail(file, where, key, f"must be {_TYPE_NAMES[wanted]}, not {value!r}")
    return table


def _at_least(file: Path, where: str, table: Table, key: str, least: int) -> None:
    if table.get(key, least) < least:
        raise _fail(file, where, key, f"must be {least} or more, not {table[key]}")


def _text(file: Path, where: str, table: Table) -> Path | None:
    """Return the path of a text, which must be readable."""
    if "text" not in table:
        return None
    path = file.parent / table["text"]
    try:
        read_text(path)
    except TritGgufError as error:
        raise _fail(file, where, "text", str(error)) from error
    return path


def _entries(file: Path, content: Table, key: str, parse: Any) -> tuple[Any, ...]:
    """Return the parsed entries of a list; each is a text or a table."""
    entries = content.get(key, [])
    if not isinstance(entries, list) or not entries:
        raise _fail(file, "", key, "is missing or empty; list at least one")
    parsed: dict[str, Any] = {}
    for number, entry in enumerate(entries, start=1):
        where = f"{key} {number}"
        if not isinstance(entry, str | dict):
            raise _fail(file, "", where, f"must be a text or a table, not {entry!r}")
        item = parse(file, where, entry)
        if item.name.lower() in parsed:
            raise _fail(file, where, "name", f"{item.name} is there twice; give one of them another name")
        parsed[item.name.lower()] = item
    return tuple(parsed.values())


def _source(file: Path, where: str, entry: str | dict[str, Any]) -> PlannedSource:
    table = {"source": entry} if isinstance(entry, str) else entry
    table = _checked(file, where, table, {"source": str, "name": str})
    if "source" not in table:
        raise _fail(file, where, "source", "is missing; give a folder, a GGUF file or a hub id (organization/name)")
    location, local = table["source"], file.parent / table["source"]
    if not local.exists() and not is_hub_id(location):
        raise _fail(file, where, "source", f"{location}: no such file or folder, and no hub id (organization/name)")
    name = table.get("name") or (local.resolve().name.removesuffix(".gguf") if local.exists() else Path(location).name)
    return PlannedSource(str(local) if local.exists() else location, _name(file, where, name))


def _configuration(file: Path, where: str, entry: str | dict[str, Any]) -> Configuration:
    table = {"name": entry} if isinstance(entry, str) else entry
    table = _checked(file, where, table, _CONFIGURATION_KEYS)
    if "name" not in table:
        raise _fail(file, where, "name", "is missing")
    name = _name(file, where, table["name"])
    if len(table) == 1 and name not in BUILT_IN:
        raise _fail(file, where, "name", f"{name} is not built in ({', '.join(BUILT_IN)}); give its options")
    options = {**BUILT_IN.get(name, {}), **table}
    if "target_size" in options:
        options["target_size"] = parse_bytes(options["target_size"])
        if options["target_size"] is None:
            raise _fail(file, where, "target_size", f"{table['target_size']} is not a size; write it like 900MB")
    try:
        return Configuration(**options)
    except TritGgufError as error:
        raise _fail(file, where, name, str(error)) from error


def _name(file: Path, where: str, name: str) -> str:
    if _NAME.fullmatch(name) is None or len(name) > _MOST_NAME:
        raise _fail(file, where, "name", f"{name!r} cannot be part of a file's name; use letters, digits, - . _")
    return name
