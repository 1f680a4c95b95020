"""Shared by all writers of output: check of free space, one-line disk errors, durable renames."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tritgguf.errors import BadRequestError, TritGgufError


def check_room(output: Path, needed: int) -> None:
    """Raise TritGgufError unless `needed` bytes are free on the disk of `output`."""
    free = shutil.disk_usage(output.parent).free
    if needed > free:
        raise TritGgufError(
            f"{output}: needs {needed / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free there; make room"
        )


class DiskError(TritGgufError):
    """Writing to the disk failed; the input is not the cause."""


@contextmanager
def disk_errors(output: Path) -> Iterator[None]:
    """Turn an OSError in the block into a DiskError that names the output."""
    try:
        yield
    except OSError as error:
        remedy = "make room" if error.errno == errno.ENOSPC else "choose another location"
        raise DiskError(f"{output}: cannot be written ({error.strerror}); {remedy}") from error


def sync_folder(folder: Path) -> None:
    """Make created or renamed entries of a folder durable; does nothing if the system cannot sync folders."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def check_new_folder(output: Path) -> None:
    """Raise BadRequestError unless a folder can be made at `output`; nothing that exists is ever replaced."""
    if os.path.lexists(output):
        raise BadRequestError(f"{output}: exists already, and no folder is ever replaced; name another one")
    if not output.parent.is_dir():
        raise BadRequestError(f"{output}: its parent folder does not exist; create it first")


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Make a folder under a temporary name; rename it to `output` if the block succeeds, remove it otherwise.

    Yields the temporary folder, which is next to the output. The block must sync the files that it writes there.
    Raises TritGgufError as `check_new_folder` does, and for disk errors.
    """
    check_new_folder(output)
    temporary = output.with_name(f".{output.name}.{os.getpid()}.partial")
    try:
        with disk_errors(output):
            temporary.mkdir()
            yield temporary
            sync_folder(temporary)
            check_new_folder(output)  # on some systems an empty folder would be replaced
            temporary.rename(output)
            sync_folder(output.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file as UTF-8 with line feeds, and sync it."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
