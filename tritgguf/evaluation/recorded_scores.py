"""Recording in trit files what `verify` has measured of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tritgguf.errors import BadRequestError, TritGgufError
from tritgguf.formats.file_kinds import is_hub_id
from tritgguf.formats.gguf_file import open_trit_file
from tritgguf.formats.header_edit import replace_entries
from tritgguf.formats.scores import KEY_PREFIX, Score
from tritgguf.sources.hub_cache import is_in_cache

if TYPE_CHECKING:
    from tritgguf.evaluation.verify import VerifyReport


class ScoreRecorder:
    """Writes the scores of files into them. To be made before they are measured, which takes minutes.

    Raises BadRequestError if a file is in the hub's cache, where each file is named by its hash, and TritGgufError if
    one cannot be read.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        for file in files:
            open_trit_file(file)
            if is_in_cache(file):
                raise BadRequestError(
                    f"{file}: is in the hub's cache, whose files stay as the hub has them; record scores in a copy"
                )
        self._states = {file: _state(file) for file in files}

    def record(self, file: Path, score: Score) -> None:
        """Write a score into a file, in place of an earlier one; the tensors and all other keys stay.

        Raises TritGgufError if the file was changed since the recorder was made, or cannot be written.
        """
        if self._states[file] != _state(file):
            raise TritGgufError(f"{file}: was changed while it was measured; its score is not recorded")
        replace_entries(file, KEY_PREFIX, score.metadata())


def score_of(report: VerifyReport) -> Score:
    """Return the score that a report amounts to."""
    return Score(
        report.kl_mean,
        report.kl_p99,
        report.top1_agreement,
        report.perplexity,
        report.perplexity_reference,
        report.tokens,
        report.text,
        source_name(report.source),
        report.revision,
    )


def source_name(source: str) -> str:
    """Return what a score says of its source: the hub id, or the last part of a path."""
    return source if is_hub_id(source) and not Path(source).exists() else Path(source).name


def _state(file: Path) -> tuple[int, int, int]:
    """Return what changes when a file is replaced or written."""
    status = file.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns
