"""Values and JSON files from strangers, checked before they are used."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tritgguf.errors import DamagedFileError, TritGgufError

_MAX_COUNT = 1 << 31


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; TritGgufError when there is no such file or no object in it."""
    check_inside(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DamagedFileError(f"{path}: no such file; a Hugging Face folder needs it") from error
    except OSError as error:
        raise TritGgufError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(f"{path}: is no valid JSON ({error}); fetch the file again") from error
    if not isinstance(value, dict):
        raise DamagedFileError(f"{path}: holds no JSON object; fetch the file again")
    return value


def check_inside(path: Path) -> None:
    """Raise TritGgufError when a file of a folder is a link to somewhere else, which no model's folder needs.

    The hub's cache is the exception: what its folders `snapshots/COMMIT` show lies in `blobs` beside `snapshots`.
    """
    if not path.is_symlink():
        return
    folder, target = path.parent.resolve(), path.resolve()
    in_hub_cache = folder.parent.name == "snapshots" and target.parent == folder.parent.parent / "blobs"
    if not in_hub_cache and not target.is_relative_to(folder):
        raise DamagedFileError(
            f"{path}: is a link to {target}, outside of its folder; copy the file here if you trust it"
        )


def is_unicode(text: str) -> bool:
    """Tell whether a text from JSON can be written as UTF-8; half a surrogate pair cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def count_of(
    values: Mapping[str, Any], key: str, where: str, *, default: int | None = None, most: int = _MAX_COUNT
) -> int:
    """Return a whole number from 1 to `most` out of a configuration; TritGgufError when it is none."""
    value = values.get(key)
    if value is None:
        value = default
    if value is None:
        raise DamagedFileError(f"{where}: {key} is missing")
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise DamagedFileError(f"{where}: {key} is {value!r}, which is no count from 1 to {most}")
    return value


def positive_number(value: Any, key: str, where: str) -> float:
    """Return a configuration's value as a float; TritGgufError unless it is a number above zero."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
        raise DamagedFileError(f"{where}: {key} is {value!r}, which is no positive number")
    return float(value)
