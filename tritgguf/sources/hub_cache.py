"""Trit files in the hub's cache, which huggingface_hub keeps: what is there, adding a file, removing one.

A model's folder `models--ORGANIZATION--NAME` has the contents in `blobs`, named by their hash, `snapshots/COMMIT` with
links to them under the files' names, and `refs/main` with the newest commit.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tritgguf.errors import DamagedFileError, TritGgufError
from tritgguf.formats.durable_output import disk_errors, sync_folder
from tritgguf.formats.gguf_file import GgufFile, open_trit_file
from tritgguf.formats.scores import Score, read_score
from tritgguf.formats.trit_types import KEY_ENCODER, TritType, is_trit_type
from tritgguf.sources.hub_names import HubName, depth_in_name, is_candidate, the_chosen
from tritgguf.text_format import one_line

_PREFIX = "models--"
MAIN = "main"


@dataclass(frozen=True)
class CachedFile:
    """A trit file in the cache.

    Attributes:
        repository: the model, `organization/name`.
        path: the file's path in the model.
        revision: the commit.
        location: where it lies: a link in the commit's snapshot.
        earlier: links to it in other snapshots, which may be earlier versions.

    """

    repository: str
    path: str
    revision: str
    location: Path
    earlier: tuple[Path, ...] = ()

    @cached_property
    def _found(self) -> GgufFile | TritGgufError | OSError:
        """The open file, or why there is none."""
        try:
            return open_trit_file(self.location)
        except (TritGgufError, OSError) as error:
            return error

    @property
    def is_trit_file(self) -> bool:
        """Whether it can be opened as a trit file."""
        return isinstance(self._found, GgufFile)

    @property
    def opened(self) -> GgufFile:
        """The open file; raises as `open_trit_file`."""
        if isinstance(self._found, Exception):
            raise self._found
        return self._found

    @property
    def damage(self) -> str:
        """Why no GGUF file can be read there, and how to remove it; empty if one can, of whatever kind."""
        if isinstance(self._found, DamagedFileError):
            fault = str(self._found)
        elif not self.location.exists():
            fault = f"{self.location}: is a link to nothing"
        else:
            return ""
        return f"{fault}; to remove it: tritgguf rm {self.repository}:{self.path}"

    @property
    def depth(self) -> str:
        """The layers' trits per weight, such as `2` or `2, 3`; those that the name tells of a damaged file."""
        if self.damage:
            return depth_in_name(self.path)
        depths = {
            TritType(info.type_id).depth
            for name, info in self.opened.tensors.items()
            if name.startswith("blk.") and is_trit_type(info.type_id)
        }
        return ", ".join(map(str, sorted(depths)))

    @property
    def encoder(self) -> str:
        """The encoder that the file names."""
        return one_line(str(self.opened.metadata.get(KEY_ENCODER, "")))

    @property
    def score(self) -> Score | None:
        """What was measured of it, if the file says so."""
        return read_score(self.opened.metadata)

    @property
    def n_bytes(self) -> int:
        """Size; 0 of a link to nothing."""
        return self.location.stat().st_size if self.location.exists() else 0

    def as_dict(self) -> dict[str, Any]:
        """Return what `pull --json` and `list --json` print of it."""
        return {
            "repository": self.repository,
            "file": self.path,
            "revision": self.revision,
            "path": str(self.location),
            "depth": self.depth,
            "bytes": self.n_bytes,
            "encoder": self.encoder,
            "score": None if self.score is None else vars(self.score),
        }


def cache_folder() -> Path:
    """Return the folder of the cache: HF_HUB_CACHE, or `hub` in HF_HOME."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def model_folder(repository: str) -> Path:
    """Return the folder of a model in the cache, which may not exist."""
    return cache_folder() / (_PREFIX + repository.replace("/", "--"))


def files_in_cache(repository: str | None = None) -> list[CachedFile]:
    """Return the files in the cache, or those of one model, that may be trit files by their names; in their order."""
    everything = cache_folder().glob(f"{_PREFIX}*--*")
    folders = sorted(everything) if repository is None else [model_folder(repository)]
    return [file for folder in folders for file in _files_of(folder)]


def cached_files(repository: str | None = None) -> list[CachedFile]:
    """Return the trit files in the cache, or those of one model, by name; what cannot be read as one is left out."""
    return [file for file in files_in_cache(repository) if file.is_trit_file]


def find_cached(name: HubName) -> CachedFile | None:
    """Return the file in the cache that a name means; None if there is none, BadRequestError if there are several."""
    return the_chosen(name, cached_files(name.repository))


def is_in_cache(path: Path) -> bool:
    """Tell whether a file lies in the cache, or is a link to one there."""
    real = path.resolve()
    return real.is_relative_to(cache_folder().resolve())


def revision_of(path: Path) -> str:
    """Return the commit of a file or folder in a snapshot of a cache; empty if it is in none."""
    folders = [path.absolute(), *path.absolute().parents]
    return next((folder.name for folder in folders if folder.parent.name == "snapshots"), "")


def add_to_cache(repository: str, path: str, revision: str, content: Path) -> CachedFile:
    """Link a complete file in the model's `blobs` under its name in the snapshot of its commit, the newest one."""
    folder = model_folder(repository)
    snapshot = folder / "snapshots" / revision
    location = snapshot / path
    with disk_errors(location):
        location.parent.mkdir(parents=True, exist_ok=True)
        temporary = location.with_name(f".{location.name}.{os.getpid()}")
        temporary.unlink(missing_ok=True)
        try:
            temporary.symlink_to(os.path.relpath(content, location.parent))
        except OSError:  # Windows without the right to make links: huggingface_hub moves the file then, too
            os.replace(content, temporary)
        os.replace(temporary, location)
        reference = folder / "refs" / MAIN
        reference.parent.mkdir(exist_ok=True)
        temporary = reference.with_name(f".{MAIN}.{os.getpid()}")
        temporary.write_text(revision)
        os.replace(temporary, reference)
        sync_folder(location.parent)
    return CachedFile(repository, path, revision, location)


def remove_from_cache(file: CachedFile) -> int:
    """Remove a file, in all its versions, and what nothing else uses; return the bytes that this frees."""
    folder, freed = model_folder(file.repository), 0
    with disk_errors(file.location):
        for link in (file.location, *file.earlier):
            content = _content(link)
            n_bytes = content.stat().st_size if content.exists() else 0
            link.unlink()
            in_use = content.parent != folder / "blobs" or any(_content(other) == content for other in _links(folder))
            if content != link and not in_use:
                content.unlink(missing_ok=True)
            freed += 0 if content.exists() else n_bytes
        _remove_empty(folder)
    return freed


def _files_of(folder: Path) -> Iterator[CachedFile]:
    """Yield the candidates in a model's folder, each once: in the newest snapshot that has it."""
    repository = folder.name.removeprefix(_PREFIX).replace("--", "/", 1)
    newest = _read(folder / "refs" / MAIN)
    found: dict[str, list[Path]] = {}
    snapshots = [path for path in (folder / "snapshots").glob("*") if path.is_dir()]
    for snapshot in sorted(snapshots, key=lambda path: (path.name != newest, -path.stat().st_mtime, path.name)):
        for location in snapshot.rglob("*.gguf"):
            if is_candidate(path := location.relative_to(snapshot).as_posix()) and not location.is_dir():
                found.setdefault(path, []).append(location)
    for path, locations in sorted(found.items()):
        depth = len(Path(path).parts)
        yield CachedFile(repository, path, locations[0].parents[depth - 1].name, locations[0], tuple(locations[1:]))


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8").strip()
    except (OSError, ValueError):
        return ""


def _content(link: Path) -> Path:
    """Return what a link in a snapshot points at, one step further: a content may itself be a link to a shared one."""
    return Path(os.path.abspath(link.parent / os.readlink(link))) if link.is_symlink() else link


def _links(folder: Path) -> Iterator[Path]:
    """Yield all links in the snapshots of a model."""
    return (path for path in (folder / "snapshots").rglob("*") if path.is_symlink())


def _remove_empty(folder: Path) -> None:
    """Remove snapshots without files and references to them; and the model's folder if nothing is left in it."""
    snapshots = folder / "snapshots"
    for path in sorted(snapshots.rglob("*"), key=lambda path: -len(path.parts)):
        with contextlib.suppress(OSError):  # it is not empty
            if path.is_dir() and not path.is_symlink():
                path.rmdir()
    for reference in [path for path in (folder / "refs").rglob("*") if path.is_file()]:
        if not (snapshots / _read(reference)).is_dir():
            reference.unlink()
    for part in (folder / "blobs", folder / "refs"):
        with contextlib.suppress(OSError):
            part.rmdir()
    if list(folder.iterdir()) == [snapshots] and not any(snapshots.iterdir()):
        snapshots.rmdir()
        folder.rmdir()
