"""Replacing metadata of a GGUF file that exists; its tensors stay as they are, byte by byte."""

from __future__ import annotations

import mmap
import os
import shutil
import struct
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tritgguf.errors import DamagedFileError
from tritgguf.formats.durable_output import check_output, check_room, disk_errors, sync_folder
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.formats.gguf_header import MAGIC, HeaderParser
from tritgguf.formats.gguf_writer import encode_entries

if TYPE_CHECKING:
    from gguf import GGUFValue

_COPY_BYTES = 1 << 23


def replace_entries(path: Path, prefix: str, entries: Mapping[str, GGUFValue]) -> None:
    """Replace all metadata of a file whose key begins with `prefix` by `entries`.

    A new file is written beside it, checked, synced and renamed. Until then the old one is untouched; who has it
    open keeps it. Other keys and all tensors keep their bytes. Raises TritGgufError if the file is damaged or
    cannot be written.
    """
    target = check_output(path, overwrite=True)
    old = GgufFile(target)
    with disk_errors(target), target.open("rb") as source:
        with mmap.mmap(source.fileno(), 0, access=mmap.ACCESS_READ) as content:
            parser = HeaderParser(content, target)
            header = _new_header(parser, content, prefix, entries)
            check_room(target, len(header) + len(content) - parser.data_start)
        # A name of its own: `PATH.part` may be a conversion that can be resumed.
        number, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".partial")
        try:
            with os.fdopen(number, "wb") as file:
                file.write(header)
                source.seek(parser.data_start)
                shutil.copyfileobj(source, file, _COPY_BYTES)
                file.flush()
                os.fsync(file.fileno())
            _check_same_tensors(old, GgufFile(name))
            shutil.copymode(target, name)
            os.replace(name, target)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        sync_folder(target.parent)


def _new_header(parser: HeaderParser, content: mmap.mmap, prefix: str, entries: Mapping[str, GGUFValue]) -> bytes:
    """Return the header with the new entries after the others, padded to where the tensors' data begins."""
    starts = {key: position - 12 - len(key.encode()) for key, (_, position) in parser.entries.items()}
    ends = dict(zip(starts, [*list(starts.values())[1:], parser.keys_end], strict=True))
    kept = [content[starts[key] : ends[key]] for key in starts if not key.startswith(prefix)]
    version = content[len(MAGIC) : len(MAGIC) + 4]
    counts = struct.pack("<QQ", len(parser.tensors), len(kept) + len(entries))
    infos = content[parser.keys_end : parser.header_end]
    header = b"".join((MAGIC, version, counts, *kept, encode_entries(entries), infos))
    return header + bytes(-len(header) % parser.alignment)


def _check_same_tensors(old: GgufFile, new: GgufFile) -> None:
    """Raise DamagedFileError unless a new file has the tensors of an old one, at the same places in the data."""
    shift = {info.offset - old.tensors[name].offset for name, info in new.tensors.items() if name in old.tensors}
    if old.tensors.keys() != new.tensors.keys() or len(shift) > 1:
        raise DamagedFileError(f"{old.path}: its metadata could not be replaced; the file is unchanged")
