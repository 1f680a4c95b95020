"""Opening a source by path or hub id."""

from __future__ import annotations

from pathlib import Path

from tritgguf.errors import BadRequestError
from tritgguf.formats.file_kinds import is_hub_id
from tritgguf.sources.gguf import GgufSource
from tritgguf.sources.hf_folder import HfFolderSource
from tritgguf.sources.hub import download
from tritgguf.sources.source import Source


def open_source(location: str | Path, *, revision: str | None = None) -> Source:
    """Open a folder, a GGUF file, or, if neither exists, the hub model `organization/name`.

    `revision` is a branch, tag or commit of the hub model. Raises TritGgufError for an invalid source.
    """
    path = Path(location)
    if path.is_dir():
        return HfFolderSource(path)
    if path.is_file():
        return GgufSource(path)
    if not is_hub_id(str(location)):
        raise BadRequestError(f"{location}: no such file or folder, and no hub id (organization/name) either")
    return HfFolderSource(download(str(location), revision), hub_id=str(location))
