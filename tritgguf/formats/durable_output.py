"""Shared by all writers of output: check of free space, one-line disk errors, durable renames."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, cast

from tritgguf.errors import BadRequestError, TritGgufError
from tritgguf.text_format import format_bytes

if sys.platform != "win32":
    import fcntl

_OPEN_FLAGS = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)


def check_room(output: Path, needed: int) -> None:
    """Raise TritGgufError unless `needed` bytes are free on the disk of `output`."""
    free = shutil.disk_usage(output.parent).free
    if needed > free:
        raise TritGgufError(
            f"{output}: needs {format_bytes(needed)}, {format_bytes(needed - free)} more than are free there; make room"
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


def open_locked(part: Path, if_busy: str) -> BinaryIO:
    """Open an unfinished file for reading and writing, and lock it; the lock ends with the process.

    Raises TritGgufError with the message `if_busy` if another process has locked it, and OSError.
    """
    while True:
        file = cast("BinaryIO", os.fdopen(os.open(part, _OPEN_FLAGS, 0o666), "r+b"))
        if sys.platform == "win32":
            return file
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.close()
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            raise TritGgufError(if_busy) from error
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(part)):
                return file
        file.close()  # another process finished and renamed this file in the meantime


def sync_folder(folder: Path) -> None:
    """Make created or renamed entries of a folder durable; does nothing if the system cannot sync folders."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


PART_SUFFIXES = ("", ".part", ".part.journal", ".part.text", ".part.calibrated")
"""What writers append to the name of an output for the files that they write."""


def check_output(
    output: str | Path, overwrite: bool, inputs: Iterable[str | Path | None] = (), *, resume: bool = False
) -> Path:
    """Return the path of the file to write: the output, or the file that it links to.

    `inputs` are the files and folders that are read (others, such as hub ids, are ignored); none of them is ever
    replaced. Raises BadRequestError unless a regular file can be written there, and if a file exists and `overwrite` is
    false; with `resume`, the message says whether there is anything to resume.
    """
    output = Path(output)
    target = Path(os.path.realpath(output)) if output.is_symlink() else output
    if target.is_dir():
        raise BadRequestError(f"{output}: is a folder; name a file")
    for path in _files_of(inputs):
        if any(_is_same(target.with_name(target.name + suffix), path) for suffix in PART_SUFFIXES):
            raise BadRequestError(f"{output}: writing it would replace {path}, which is read; name another output")
    if os.path.lexists(target) and not target.is_file():
        raise BadRequestError(f"{output}: is no regular file (a device, a pipe or a broken link); name another output")
    if target.exists() and not overwrite:
        if resume and not target.with_name(target.name + PART_SUFFIXES[1]).exists():
            raise BadRequestError(
                f"{output}: is complete, so there is nothing to resume; use --overwrite to write it again"
            )
        raise BadRequestError(f"{output}: exists already; name another file or use --overwrite")
    if not target.parent.is_dir():
        raise BadRequestError(f"{output}: its folder does not exist; create it first")
    return target


def _files_of(inputs: Iterable[str | Path | None]) -> Iterator[Path]:
    """Yield the existing files among some paths, and the files in the folders among them."""
    for path in (Path(given) for given in inputs if given is not None):
        if path.is_dir():
            yield from (file for file in path.iterdir() if file.is_file())
        elif path.exists():
            yield path


def _is_same(path: Path, other: Path) -> bool:
    """Tell whether two paths are one file, also through links."""
    return path.exists() and path.samefile(other)


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


def replace_text(path: Path, text: str) -> None:
    """Write a text file under a temporary name, then rename it; DiskError if that fails."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with disk_errors(path):
            write_text(temporary, text)
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
