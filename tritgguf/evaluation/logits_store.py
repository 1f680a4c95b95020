"""The source's logits on disk, so that another file of the same source needs only its own.

A float32 number for each token and each entry of the vocabulary: 311 MB for 512 tokens and 151,936 entries. The store
has a bound, and what was used the longest time ago goes first.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from cpu_kernels.compilation.kernel_cache import user_cache_folder
from tritgguf.errors import BadRequestError
from tritgguf.text_format import parse_bytes
from tritgguf.version import __version__

if TYPE_CHECKING:
    from tritgguf.sources.source import Source

BOUND_VARIABLE = "TRITGGUF_LOGITS"
_DEFAULT_BOUND = "4GB"
_SUFFIX = ".logits.npy"


class LogitsStore:
    """Files of logits in a folder, at most `bound` bytes together."""

    def __init__(self, folder: Path, bound: int) -> None:
        self.folder, self.bound = folder, bound

    def find(self, key: str, tokens: int) -> np.ndarray | None:
        """Return the logits for a key: float32 [tokens, vocabulary], mapped; None if they are not here or damaged."""
        path = self._path(key)
        try:
            logits = np.load(path, mmap_mode="r")
            os.utime(path)
        except (OSError, ValueError, EOFError):
            return None
        return logits if logits.ndim == 2 and len(logits) == tokens and logits.dtype == np.float32 else None

    @contextmanager
    def keeping(self, key: str, tokens: int) -> Iterator[Callable[[np.ndarray], None]]:
        """Yield a function that takes logits, [n, vocabulary], until there are `tokens` of them.

        They are here if the block succeeds and they fit; what else is here makes room. A disk that is full or cannot be
        written only means that nothing is kept.
        """
        path = self._path(key)
        part = path.with_name(f"{path.name}.{os.getpid()}")
        with contextlib.ExitStack() as opened:
            file: BinaryIO | None = None
            failed = False

            def keep(logits: np.ndarray) -> None:
                nonlocal file, failed
                try:
                    if file is None and not failed:
                        self._make_room(4 * tokens * logits.shape[1])
                        file = opened.enter_context(part.open("wb"))
                        header = {"descr": "<f4", "fortran_order": False, "shape": (tokens, logits.shape[1])}
                        np.lib.format.write_array_header_1_0(file, header)
                    if file is not None and not failed:
                        file.write(np.ascontiguousarray(logits, np.float32).data)
                except OSError:
                    failed = True

            try:
                yield keep
                opened.close()
                if file is not None and not failed:
                    with contextlib.suppress(OSError):
                        os.replace(part, path)
            finally:
                with contextlib.suppress(OSError):
                    part.unlink(missing_ok=True)

    def _make_room(self, n_bytes: int) -> None:
        """Remove the oldest logits so that `n_bytes` more fit; OSError if they never do, or not on this disk."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if n_bytes > self.bound:
            raise OSError("more than the bound")
        used = [(path.stat().st_mtime, path.stat().st_size, path) for path in self.folder.glob(f"*{_SUFFIX}")]
        total = sum(size for _, size, _ in used) + n_bytes
        for _, size, path in sorted(used):
            if total > self.bound:
                path.unlink(missing_ok=True)
                total -= size
        if shutil.disk_usage(self.folder).free < 2 * n_bytes:
            raise OSError("the disk is nearly full")

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}{_SUFFIX}"


def user_store() -> LogitsStore | None:
    """Return the store of the user; None if TRITGGUF_LOGITS is 0. BadRequestError if it is no size."""
    text = os.environ.get(BOUND_VARIABLE, _DEFAULT_BOUND)
    bound = 0 if text.strip() == "0" else parse_bytes(text)
    if bound is None:
        raise BadRequestError(f"{BOUND_VARIABLE} is {text}, which is no size; write it like 4GB, or 0 to keep none")
    return LogitsStore(user_cache_folder() / "logits", bound) if bound else None


def logits_key(source: Source, windows: Sequence[Sequence[int]]) -> str:
    """Return a name for a source's logits of windows of tokens: a hash of the source's files, tokens and versions."""
    files = []
    for file in source.files:
        status = file.stat()
        files.append((str(file.resolve()), status.st_size, status.st_mtime_ns))
    versions = [__version__, *(_version_of(package) for package in ("torch", "transformers"))]
    described = json.dumps([files, [list(map(int, window)) for window in windows], versions])
    return hashlib.sha256(described.encode()).hexdigest()[:32]


def _version_of(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
