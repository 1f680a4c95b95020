"""Recognizing what a file is when it is not what its name says: a line for the user instead of a parser's error."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

_LFS = b"version https://git-lfs.github.com/spec/"
# First bytes of files that users take for a model, and what to do instead.
_KINDS = (
    (_LFS, "is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`"),
    (b"PK\x03\x04", "is a ZIP archive or pickled PyTorch weights; save the model as safetensors and convert that"),
    (b"\x80\x02", "holds pickled weights, which can run code when they are loaded; save the model as safetensors"),
    (b"\x1f\x8b", "is compressed with gzip; unpack it first"),
    (b"\x28\xb5\x2f\xfd", "is compressed with zstd; unpack it first"),
    (b"tjgg", "is a GGML file from before GGUF; fetch a GGUF file of the model"),
    (b"lmgg", "is a GGML file from before GGUF; fetch a GGUF file of the model"),
    (b"fmgg", "is a GGML file from before GGUF; fetch a GGUF file of the model"),
    (b"GGUF", "is a GGUF file"),
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_WEB_PAGES = (b"<!doctype html", b"<html")
HEAD_BYTES = 64
"""How many bytes of a file these functions look at."""


def is_lfs_pointer(head: bytes) -> bool:
    """Tell whether a file is the pointer that Git keeps in place of a large file that was not fetched."""
    return head.startswith(_LFS)


def foreign_kind(head: bytes) -> str | None:
    """Return what a file is and what to do, for the end of `FILE: ...`; None if its first bytes are unknown."""
    head = head[:HEAD_BYTES]
    for magic, kind in _KINDS:
        if head.startswith(magic):
            return kind
    if head.lstrip()[:16].lower().startswith(_WEB_PAGES):
        return "is a web page, not the file itself; fetch it again from its download link"
    return None


def is_safetensors(head: bytes) -> bool:
    """Tell whether a file looks like safetensors, which has no magic number: the length of a JSON object, then it."""
    return head[8:10] == b'{"' and 0 < int.from_bytes(head[:8], "little") < 1 << 32


def is_hub_id(text: str) -> bool:
    """Tell whether a text has the form of a model's name on the Hugging Face hub, `organization/name`."""
    return _HUB_ID.fullmatch(text) is not None and not text.endswith((".gguf", ".safetensors"))


def conversion_command(source: str | Path) -> str:
    """Return the command that makes a trit file of a folder, a hub id or a stock GGUF file."""
    name = Path(source).resolve().name
    output = f"{name.removesuffix('.gguf')}-trit.gguf" if name.endswith(".gguf") else f"{name}.gguf"
    return f"tritgguf convert {shlex.quote(str(source))} {shlex.quote(output)}"
