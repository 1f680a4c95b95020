"""What has been made: settings, checksum and results of every finished file, as JSON beside the output.

A file is ours if its checksum is the one that was noted. Others are never replaced.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

from tritgguf.errors import BadRequestError, DamagedFileError
from tritgguf.formats.durable_output import disk_errors, open_locked, replace_text

WORK_FOLDER = ".publish"
_CHUNK = 1 << 20
Entry = dict[str, Any]


class State:
    """The notes about an output folder, which are on disk after every change."""

    def __init__(self, output: Path) -> None:
        self._output = output
        self._path = output / WORK_FOLDER / "state.json"
        self._entries: dict[str, Entry] = {}
        self._checksums: dict[tuple[Path, int, int], str] = {}  # of files, by size and time
        if self._path.exists():
            try:
                self._entries = json.loads(self._path.read_text("utf-8"))
                valid = all({"settings", "checksum", "result"} <= entry.keys() for entry in self._entries.values())
            except (ValueError, AttributeError):
                valid = False
            if not valid:
                raise DamagedFileError(f"{self._path}: is damaged; move the folder {output} away and start again")

    def result(self, stage: str, path: Path, settings: Any) -> Any:
        """Return what a stage noted about a file; None if it is not there, was changed or was made otherwise."""
        entry = self._entries.get(self._key(stage, path))
        if entry is None or entry["settings"] != digest(settings) or not self._is_unchanged(entry, path):
            return None
        return entry["result"]

    def check_ours(self, stage: str, path: Path) -> None:
        """Raise BadRequestError if something is at a path that a stage has not made, or that was changed since.

        What is there after a stage has begun was made by it, even if its end was not noted.
        """
        entry = self._entries.get(self._key(stage, path))
        begun = self._entries.get(self._begun_key(stage, path))
        if begun is not None and path.exists() and begun["checksum"] != self._checksum(path):
            return
        if path.exists() and (entry is None or not self._is_unchanged(entry, path)):
            raise BadRequestError(f"{path}: exists, and `publish` has not made it or it was changed; move it away")

    def has_begun(self, stage: str, path: Path, settings: Any) -> bool:
        """Tell whether a stage has begun to make a file with these settings, and its end was not noted."""
        begun = self._entries.get(self._begun_key(stage, path))
        return begun is not None and begun["settings"] == digest(settings)

    def begin(self, stage: str, path: Path, settings: Any) -> str:
        """Note that a stage begins to make a file, unless that is noted already.

        Returns the checksum of what was there when it began, empty for nothing: whatever else is there is the result.
        """
        key = self._begun_key(stage, path)
        if not self.has_begun(stage, path, settings):
            there = self._checksum(path) if path.exists() else ""
            self._entries[key] = {"settings": digest(settings), "checksum": there, "result": None}
            self._save()
        return str(self._entries[key]["checksum"])

    def noted(self, stage: str, path: Path) -> Any:
        """Return what a stage noted about a file, which it has made."""
        return self._entries[self._key(stage, path)]["result"]

    def finish(self, stage: str, path: Path, settings: Any, result: Any) -> None:
        """Note that a stage has made a file, or measured it."""
        self._entries.pop(self._begun_key(stage, path), None)
        self._entries[self._key(stage, path)] = {
            "settings": digest(settings),
            "checksum": self._checksum(path),
            "result": result,
        }
        self._save()

    def checksum_of(self, stage: str, path: Path) -> str:
        """Return the checksum that was noted of a file."""
        return str(self._entries[self._key(stage, path)]["checksum"])

    @contextmanager
    def changing(self, stage: str, path: Path) -> Iterator[None]:
        """Let the block change a file that a stage has made; it stays ours even if the program is killed meanwhile."""
        entry = self._entries[self._key(stage, path)]
        entry["changing"] = True
        self._save()
        yield
        del entry["changing"]
        entry["checksum"] = self._checksum(path)
        self._save()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the output folder, which is made; TritGgufError if another process does."""
        with disk_errors(self._output):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            lock = open_locked(self._path.with_name("lock"), f"{self._output}: another `publish` is writing there")
        with lock:
            yield

    def _key(self, stage: str, path: Path) -> str:
        return f"{stage} {path.relative_to(self._output).as_posix()}"

    def _begun_key(self, stage: str, path: Path) -> str:
        return f"begun {self._key(stage, path)}"

    def _is_unchanged(self, entry: Entry, path: Path) -> bool:
        return path.exists() and ("changing" in entry or entry["checksum"] == self._checksum(path))

    def _checksum(self, path: Path) -> str:
        """Return a checksum; that of a file which is as it was at the last look is not computed again."""
        if path.is_dir():
            return checksum(path)
        status = path.stat()
        key = (path, status.st_size, status.st_mtime_ns)
        if key not in self._checksums:
            self._checksums[key] = checksum(path)
        return self._checksums[key]

    def _save(self) -> None:
        replace_text(self._path, json.dumps(self._entries, indent=1) + "\n")


def digest(settings: Any) -> str:
    """Return a hash of settings, which JSON can hold."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def checksum(path: Path) -> str:
    """Return the checksum of a file, or of a folder's files and their names."""
    found = xxhash.xxh3_128()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if not file.is_file():
            continue
        found.update(file.relative_to(path).as_posix().encode())
        with file.open("rb") as content:
            while chunk := content.read(_CHUNK):
                found.update(chunk)
    return found.hexdigest()
