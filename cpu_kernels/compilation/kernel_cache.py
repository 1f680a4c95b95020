"""The cache of compiled kernels: a file for each kernel and combination of argument types.

The name of a file has a hash of whatever the machine code depends on: the sources of this package, Numba and LLVM, the
processor, and Numba's settings. A file begins with a hash of its content, so a damaged one is not used. Disk errors are
logged once and not raised: only the next start would use the cache.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import logging
import os
import sys
import tempfile
import time
from pathlib import Path

import llvmlite
import llvmlite.binding as llvm

FOLDER_VARIABLE = "NUMBA_CACHE_DIR"
SUFFIX = ".kernel"
_PACKAGE = Path(__file__).resolve().parents[1]
_HASH_BYTES = 20
_MOST_SECONDS = 30 * 24 * 3600
_logger = logging.getLogger(_PACKAGE.name)


@functools.cache
def folder() -> Path | None:
    """Return the first folder that can be written: NUMBA_CACHE_DIR, the package's own, or the user's; None if none."""
    configured = os.environ.get(FOLDER_VARIABLE)
    candidates = [Path(configured)] if configured else []
    candidates += [_PACKAGE / "__pycache__", user_cache_folder()]
    for candidate in candidates:
        with contextlib.suppress(OSError):
            candidate.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=candidate):
                return candidate
    _warn_once("no cache folder is writable")
    return None


def user_cache_folder() -> Path:
    """Return where the system wants what this program keeps and can make again; the folder may not exist."""
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home())
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "tritgguf"


@functools.cache
def fingerprint() -> str:
    """Return a hash of what all machine code depends on; kernels with another one are not used."""
    digest = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*.py")):
        digest.update(path.relative_to(_PACKAGE).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    settings = sorted(
        item for item in os.environ.items() if item[0].startswith("NUMBA_") and item[0] != FOLDER_VARIABLE
    )
    features = llvm.get_host_cpu_features().flatten()
    parts = (llvmlite.__version__, _numba_version(), llvm.get_host_cpu_name(), features, sys.platform, settings)
    digest.update(repr(parts).encode())
    return digest.hexdigest()


def _numba_version() -> bytes:
    """Return the file that has Numba's version, which is read without importing Numba."""
    found = importlib.util.find_spec("numba")
    if found is None or found.origin is None:
        return b""
    with contextlib.suppress(OSError):
        return Path(found.origin).with_name("_version.py").read_bytes()
    return b""


def file_name(kernel: str, types: str) -> str:
    """Return the name of the file for a kernel and its argument types."""
    return f"{kernel}-{hashlib.sha256(f'{fingerprint()} {types}'.encode()).hexdigest()[:24]}{SUFFIX}"


def has(name: str) -> bool:
    """Tell whether there is a file of this name."""
    return (place := folder()) is not None and (place / name).exists()


def read(name: str) -> bytes | None:
    """Return a file's content; None if there is none, or if it is damaged or unreadable."""
    place = folder()
    if place is None:
        return None
    try:
        stored = (place / name).read_bytes()
    except OSError:
        return None
    content = stored[_HASH_BYTES:]
    return content if stored[:_HASH_BYTES] == _hash(content) else None


def write(name: str, content: bytes) -> None:
    """Write a file at once, so that no other process sees a part of it; an error of the file system is logged once."""
    place = folder()
    if place is None:
        return
    try:
        number, temporary = tempfile.mkstemp(dir=place)
        try:
            with os.fdopen(number, "wb") as file:
                file.write(_hash(content) + content)
            Path(temporary).replace(place / name)
        except BaseException:
            Path(temporary).unlink()
            raise
    except OSError as error:
        _warn_once(f"{place}: {error.strerror or error}")


def remove_old() -> None:
    """Remove what has lain in the cache for a month: each version of the program leaves kernels of its own behind."""
    place, oldest = folder(), time.time() - _MOST_SECONDS
    if place is None:
        return
    for path in (*place.glob(f"*-*{SUFFIX}"), *place.glob("all-*.complete")):
        with contextlib.suppress(OSError):
            if path.stat().st_mtime < oldest:
                path.unlink()


def _hash(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_HASH_BYTES).digest()


@functools.cache
def _warn_once(reason: str) -> None:
    _logger.warning(
        "note: compiled kernels cannot be cached, so every start compiles them again: %s;"
        " set NUMBA_CACHE_DIR to another folder",
        reason,
    )
