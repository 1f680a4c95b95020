"""What of a file that is being written is on the disk already, so that a conversion that was killed can go on.

Beside `OUT.part` lies `OUT.part.journal`: a line of JSON that says what is converted and how, then one for each tensor
that is whole and synced. A line is written only after its tensor, so it is true whenever the machine stops; the last
line may be torn, and then counts as not written.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tritgguf.errors import DamagedFileError
from tritgguf.formats.durable_output import disk_errors, sync_folder


@dataclass(frozen=True)
class WrittenTensor:
    """A tensor that is whole on the disk.

    Attributes:
        name: its GGUF name.
        end: where the file goes on behind it and its padding, in bytes from the file's start.
        checksum: of its bytes.
        codebook: 27 numbers, of a trit tensor.
        squared_error, squared_weights: sums that the report adds up.

    """

    name: str
    end: int
    checksum: int
    codebook: list[float] | None
    squared_error: float
    squared_weights: float


class JobLog:
    """A file that gets a line of JSON whenever a piece of a job is done; the first line is the job itself.

    Args:
        path: the file.
        output: what the job is for, which messages about the disk name.
        job: what has to be the same for the job to go on, as JSON holds it.

    """

    def __init__(self, path: Path, output: Path, job: Mapping[str, Any]) -> None:
        self.path = path
        self._output = output
        self._job = json.loads(json.dumps(job))
        self._torn_at: int | None = None  # bytes, where a line begins that was not written whole

    def entries(self) -> list[Any]:
        """Return what is done; nothing where there is no such file.

        Raises TritGgufError for the log of another job.
        """
        try:
            lines = self.path.read_text("utf-8").split("\n")
        except FileNotFoundError:
            return []
        except (OSError, UnicodeDecodeError) as error:
            raise self.misfit("cannot be read") from error
        complete, torn = lines[:-1], lines[-1]  # behind the last line feed is nothing, or a torn line
        self._torn_at = self.path.stat().st_size - len(torn.encode()) if torn else None
        try:
            entries = [json.loads(line) for line in complete]
        except json.JSONDecodeError as error:
            raise self.misfit("is damaged") from error
        if entries and entries[0] != self._job:
            raise self.misfit("is of another conversion: source, options or version differ")
        return entries[1:]

    def begin(self) -> None:
        """Start a new log in the place of an old one."""
        self._torn_at = None
        self._append([self._job], mode="w")
        sync_folder(self.path.parent)

    def append(self, entries: Sequence[Any]) -> None:
        """Add what is done, and wait until it is on the disk."""
        if self._torn_at is not None:
            with disk_errors(self._output):
                os.truncate(self.path, self._torn_at)
            self._torn_at = None
        self._append(entries, mode="a")

    def remove(self) -> None:
        """Remove the log, if it is there."""
        self.path.unlink(missing_ok=True)

    def _append(self, entries: Sequence[Any], *, mode: str) -> None:
        with disk_errors(self._output), self.path.open(mode, encoding="utf-8", newline="\n") as file:
            file.write("".join(f"{json.dumps(entry)}\n" for entry in entries))
            file.flush()
            os.fsync(file.fileno())

    def misfit(self, what: str) -> DamagedFileError:
        """Return the error that the log, as `what` says, is none to go on from."""
        return DamagedFileError(f"{self.path}: the journal {what}; start over without --resume")


class Journal(JobLog):
    """The journal of one output."""

    def __init__(self, output: Path, job: Mapping[str, Any]) -> None:
        super().__init__(output.with_name(f"{output.name}.part.journal"), output, job)

    def read(self) -> list[WrittenTensor]:
        """Return the tensors that are written; none where there is no journal.

        Raises TritGgufError for the journal of another job.
        """
        try:
            return [WrittenTensor(**entry) for entry in self.entries()]
        except TypeError as error:
            raise self.misfit("is damaged") from error

    def add(self, tensors: Sequence[WrittenTensor]) -> None:
        """Add tensors, which are on the disk."""
        self.append([asdict(tensor) for tensor in tensors])
