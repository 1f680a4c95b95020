"""Checks of untrusted JSON files and of values read from them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tritgguf.errors import DamagedFileError, TritGgufError
from tritgguf.formats.file_kinds import foreign_kind

FOLLOW_LINKS = "TRITGGUF_FOLLOW_LINKS"
_MAX_COUNT = 1 << 31


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; TritGgufError if the file is missing, invalid or not an object."""
    check_inside(path)
    data = b""
    try:
        data = path.read_bytes()
        value = json.loads(data.decode("utf-8-sig"))  # editors on Windows write a byte order mark
    except FileNotFoundError as error:
        raise DamagedFileError(f"{path}: no such file; a Hugging Face folder needs it") from error
    except OSError as error:
        raise TritGgufError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        kind = foreign_kind(data) or f"is not valid JSON ({error}); fetch the file again"
        raise DamagedFileError(f"{path}: {kind}") from error
    if not isinstance(value, dict):
        raise DamagedFileError(f"{path}: holds no JSON object; fetch the file again")
    return value


def check_inside(path: Path) -> None:
    """Raise TritGgufError if a file is a symlink that leads out of its folder.

    With such links, a folder from elsewhere could make private files part of a model. There are two exceptions. In the
    hub's cache, files in `snapshots/COMMIT` are links to `blobs`, which is next to `snapshots`. And a user can allow
    all links with the environment variable TRITGGUF_FOLLOW_LINKS=1.
    """
    if not path.is_symlink() or os.environ.get(FOLLOW_LINKS) == "1":
        return
    folder, target = path.parent.resolve(), path.resolve()
    in_hub_cache = folder.parent.name == "snapshots" and target.parent == folder.parent.parent / "blobs"
    if not in_hub_cache and not target.is_relative_to(folder):
        raise DamagedFileError(
            f"{path}: is a link to {target}, outside of its folder; if you trust it, set {FOLLOW_LINKS}=1"
        )


def is_unicode(text: str) -> bool:
    """Tell whether a string from JSON can be encoded as UTF-8; half of a surrogate pair cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def count_of(
    values: Mapping[str, Any], key: str, where: str, *, default: int | None = None, most: int = _MAX_COUNT
) -> int:
    """Return `values[key]`, or the default, as an integer from 1 to `most`; TritGgufError if it is not one."""
    value = values.get(key)
    if value is None:
        value = default
    if value is None:
        raise DamagedFileError(f"{where}: {key} is missing")
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise DamagedFileError(f"{where}: {key} is {value!r:.40}, which is not an integer from 1 to {most}")
    return value


def positive_number(value: Any, key: str, where: str) -> float:
    """Return a value of a configuration as a float; TritGgufError unless it is a positive number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
        raise DamagedFileError(f"{where}: {key} is {value!r:.40}, which is not a positive number")
    return float(value)
