"""Journal of a conversion: records which matrices are on the disk, so that a killed conversion can resume.

`OUT.part.journal` is next to `OUT.part`. Its first line of JSON describes the conversion; one line follows for each
matrix that is complete and synced. A line is written only after its matrix is synced, so the journal is valid whenever
the machine stops. An incomplete last line is ignored.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tritgguf.errors import DamagedFileError
from tritgguf.formats.durable_output import disk_errors, sync_folder

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class WrittenMatrix:
    """A matrix (or vector) that is complete on the disk.

    Attributes:
        name: its name, see `stacks`: that of its tensor, and its place in a stack.
        end: file offset of the first byte after the matrix, and after the padding if it is the last of its tensor.
        checksum: XXH3 of the tensor's bytes up to its end.
        codebook: 27 scales of packed trits; None for other types.
        squared_error, squared_weights: sums for the report.

    """

    name: str
    end: int
    checksum: int
    codebook: list[float] | None
    squared_error: float
    squared_weights: float


class JobLog:
    """A log of JSON lines: the description of a job, then one line per completed step.

    Args:
        path: the log file.
        output: the job's output, which disk errors name.
        job: JSON-serializable description; a job can resume only if it is unchanged.

    """

    def __init__(self, path: Path, output: Path, job: Mapping[str, Any]) -> None:
        self.path = path
        self._output = output
        self._job = json.loads(json.dumps(job))
        self._torn_at: int | None = None  # file offset of an incomplete last line

    def entries(self) -> list[Any]:
        """Return the completed steps; none if there is no log file.

        Raises TritGgufError for the log of another job.
        """
        try:
            lines = self.path.read_text("utf-8").split("\n")
        except FileNotFoundError:
            return []
        except (OSError, UnicodeDecodeError) as error:
            raise self.misfit("cannot be read") from error
        complete, torn = lines[:-1], lines[-1]  # the last line has no line feed: it is empty or incomplete
        self._torn_at = self.path.stat().st_size - len(torn.encode()) if torn else None
        try:
            entries = [json.loads(line) for line in complete]
        except json.JSONDecodeError as error:
            raise self.misfit("is damaged") from error
        if entries and entries[0] != self._job:
            raise self.misfit("is of another conversion: source, options or version differ")
        return entries[1:]

    def begin(self) -> None:
        """Start a new log; replace an old one."""
        self._torn_at = None
        self._append([self._job], mode="w")
        sync_folder(self.path.parent)

    def append(self, entries: Sequence[Any]) -> None:
        """Append completed steps and sync the log."""
        if self._torn_at is not None:
            with disk_errors(self._output):
                os.truncate(self.path, self._torn_at)
            self._torn_at = None
        self._append(entries, mode="a")

    def remove(self) -> None:
        """Remove the log if it exists."""
        self.path.unlink(missing_ok=True)

    def _append(self, entries: Sequence[Any], *, mode: str) -> None:
        with disk_errors(self._output), self.path.open(mode, encoding="utf-8", newline="\n") as file:
            file.write("".join(f"{json.dumps(entry)}\n" for entry in entries))
            file.flush()
            os.fsync(file.fileno())

    def misfit(self, what: str) -> DamagedFileError:
        """Return the error for a log that the job cannot resume from; `what` is the reason."""
        return DamagedFileError(f"{self.path}: the journal {what}; start over without --resume")


class ResumableLog:
    """A log of what was calculated for an output before it is written, so that `--resume` can reuse it.

    A context manager: at its end the log is deleted, unless it ends with an interruption, or with an error of a run
    that was to resume, or an unfinished output file is left, because they need it again.

    Args:
        output: the output file of the conversion.
        suffix: what the log's name has after that of the output.
        resume: whether the entries of an interrupted run are reused; otherwise they are calculated again.

    """

    def __init__(self, output: Path, suffix: str, *, resume: bool) -> None:
        self._output, self._resume = output, resume
        self._path = output.with_name(f"{output.name}{suffix}")
        self._log: JobLog | None = None

    def open(self, job: Mapping[str, Any]) -> list[Any]:
        """Return the entries of the interrupted run; TritGgufError if they belong to another job."""
        self._log = JobLog(self._path, self._output, job)
        entries = self._log.entries() if self._resume else []
        if not entries:
            self._log.begin()
        return entries

    def add(self, entry: Any) -> None:
        """Save an entry, if the log is open."""
        if self._log is not None:
            self._log.append([entry])

    def damaged(self) -> DamagedFileError:
        """Return the error for entries that are not what they ought to be."""
        assert self._log is not None
        return self._log.misfit("is damaged")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        is_kept = error is not None and (self._resume or not isinstance(error, Exception))
        if not is_kept and not self._output.with_name(f"{self._output.name}.part").exists():
            self._path.unlink(missing_ok=True)


class Journal(JobLog):
    """The journal of one output."""

    def __init__(self, output: Path, job: Mapping[str, Any]) -> None:
        super().__init__(output.with_name(f"{output.name}.part.journal"), output, job)

    def read(self) -> list[WrittenMatrix]:
        """Return the written matrices; none if there is no journal.

        Raises TritGgufError for the journal of another job.
        """
        try:
            return [WrittenMatrix(**entry) for entry in self.entries()]
        except TypeError as error:
            raise self.misfit("is damaged") from error

    def add(self, matrices: Sequence[WrittenMatrix]) -> None:
        """Append matrices that are synced to the disk."""
        self.append([asdict(matrix) for matrix in matrices])
