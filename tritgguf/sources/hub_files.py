"""Finding and fetching trit files on the hub.

huggingface_hub names the hub, sends the token and speaks HTTP. The download is ours, because a broken one of
huggingface_hub starts over and its content is not compared with its hash. Here, a file grows in the cache as
`blobs/HASH.incomplete`, which the next attempt continues. It gets its name when size and hash are those that the hub
has told, and when it is a trit file.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tritgguf.errors import BadRequestError, DamagedFileError, TritGgufError
from tritgguf.formats.durable_output import check_room, disk_errors, open_locked
from tritgguf.formats.file_kinds import conversion_command
from tritgguf.formats.gguf_header import MAGIC, head_has_key
from tritgguf.formats.trit_types import KEY_VERSION
from tritgguf.sources.hub import first_line, hub_errors, is_transport_error
from tritgguf.sources.hub_cache import CachedFile, add_to_cache, files_in_cache, find_cached, model_folder
from tritgguf.sources.hub_names import HubName, depth_in_name, is_candidate, the_chosen
from tritgguf.text_format import format_bytes

Progress = Callable[[str, int, int], None]
"""Called with what is being done, the bytes done and their total."""
_CHUNK_BYTES = 1 << 20
_FIRST_LOOK_BYTES = 1 << 16  # into a file whose first bytes tell that it is no trit file
_ATTEMPTS = 3  # without a byte in between
_SECONDS_BETWEEN_ATTEMPTS = 1.0
_REMEDY_OFFLINE = "go online, or name a file (`tritgguf list` shows those in the cache)"


@dataclass(frozen=True)
class RemoteFile:
    """A file on the hub that may be a trit file.

    Attributes:
        repository: the model, `organization/name`.
        path: the file's path in the model.
        revision: the commit.
        n_bytes: size.
        digest: SHA-256 of the content, or Git's SHA-1 of a file that is not in large file storage.

    """

    repository: str
    path: str
    revision: str
    n_bytes: int
    digest: str

    @property
    def depth(self) -> str:
        """The layers' trits per weight as the file's name tells them."""
        return depth_in_name(self.path)

    def new_hash(self) -> hashlib._Hash:
        """Return the hash of no content yet, of the kind of `digest`."""
        if len(self.digest) == 2 * hashlib.sha256().digest_size:
            return hashlib.sha256()
        return hashlib.sha1(f"blob {self.n_bytes}\0".encode(), usedforsecurity=False)


def local_or_fetched(name: HubName, progress: Progress) -> CachedFile:
    """Return the file that a name means: from the cache without asking the hub, else from the hub, as `pull` does.

    Raises DamagedFileError for a file in the cache that cannot be read, and as `pull` does.
    """
    if (file := find_cached(name)) is not None:
        return file
    damaged = [file for file in files_in_cache(name.repository) if file.damage and file.location.exists()]
    if (file := the_chosen(name, damaged)) is not None:
        raise DamagedFileError(file.damage)
    return pull(name, progress)


def pull(name: HubName, progress: Progress) -> CachedFile:
    """Return the newest version of the file that a name means, fetched unless the cache has it.

    Raises TritGgufError if the hub cannot be reached, refuses or lacks it, if what it sends is no trit file or another
    one than it has told, and BadRequestError if the name means several files.
    """
    remote = find_remote(name)
    blob = model_folder(remote.repository) / "blobs" / remote.digest
    location = model_folder(remote.repository) / "snapshots" / remote.revision / remote.path
    if not blob.exists() and not location.exists():
        _fetch(remote, blob, progress)
    if location.exists():
        return CachedFile(remote.repository, remote.path, remote.revision, location)
    return add_to_cache(remote.repository, remote.path, remote.revision, blob)


def find_remote(name: HubName) -> RemoteFile:
    """Return the file on the hub that a name means; raises as `pull`."""
    from huggingface_hub import HfApi, constants

    with hub_errors(name.repository, None, _REMEDY_OFFLINE):
        timeout = constants.HF_HUB_ETAG_TIMEOUT
        model = HfApi().model_info(name.repository, files_metadata=True, timeout=timeout)
    paths = [file.rfilename for file in model.siblings or []]
    remote = [
        RemoteFile(
            name.repository,
            file.rfilename,
            str(model.sha),
            file.size or 0,
            str(file.blob_id if file.lfs is None else file.lfs.sha256),
        )
        for file in model.siblings or []
        if is_candidate(file.rfilename)
    ]
    found = the_chosen(name, remote)
    if found is not None:
        _check_answer(found)
        return found
    if remote:
        raise BadRequestError(f"{name}: has no such file; it has {', '.join(file.path for file in remote)}")
    raise BadRequestError(_without_trit_file(name.repository, paths))


def _without_trit_file(repository: str, paths: list[str]) -> str:
    """Return what to say of a model without a trit file."""
    if any(path.endswith(".safetensors") for path in paths):
        return f"{repository}: the hub has no trit file of this model; make one: {conversion_command(repository)}"
    return f"{repository}: the hub has neither a trit file of this model nor safetensors to convert"


def _check_answer(file: RemoteFile) -> None:
    """Raise DamagedFileError unless the hub has told a usable size and hash: they become the name of a file."""
    is_hash = len(file.digest) in (40, 64) and set(file.digest) <= set("0123456789abcdef")
    is_commit = file.revision.isalnum()
    is_inside = not file.path.startswith("/") and ".." not in Path(file.path).parts and "\\" not in file.path
    if not (is_hash and is_commit and is_inside and file.n_bytes > 0):
        raise DamagedFileError(f"{file.repository}: the hub's answer lacks {file.path}'s size or hash; try again later")


def _fetch(file: RemoteFile, blob: Path, progress: Progress) -> None:
    """Download and check a file; `blob` appears when it is whole."""
    part = blob.with_name(f"{blob.name}.incomplete")
    with disk_errors(blob):
        blob.parent.mkdir(parents=True, exist_ok=True)
        busy = f"{file.repository}: another process is fetching {file.path}; wait for it"
        with open_locked(part, busy) as content:
            if blob.exists():
                return
            done = content.seek(0, os.SEEK_END)
            check_room(blob, file.n_bytes - done)
            try:
                _Download(file, blob, content, progress).finish()
                _check_content(file, content, progress)
            except (BadRequestError, DamagedFileError):
                part.unlink()
                raise
            os.fsync(content.fileno())
            os.replace(part, blob)


class _Download:
    """Appends what is missing of a file to what an earlier attempt has left."""

    def __init__(self, file: RemoteFile, blob: Path, content: BinaryIO, progress: Progress) -> None:
        self._file, self._blob, self._content, self._progress = file, blob, content, progress
        self._next_look = _FIRST_LOOK_BYTES

    def finish(self) -> None:
        """Download until nothing is missing. A connection that breaks is made again, while that brings bytes."""
        attempts, total = 0, self._file.n_bytes
        done = self._content.seek(0, os.SEEK_END)
        while done != total:
            error = self._attempt(done if done < total else 0)
            position = self._content.tell()
            attempts = attempts + 1 if position <= done else 1
            done = position
            if done != total and attempts >= _ATTEMPTS:
                raise TritGgufError(
                    f"{self._file.repository}: the connection to the hub broke"
                    f" ({'it sent less than all' if error is None else first_line(error)});"
                    f" {format_bytes(done)} of {format_bytes(total)} are here, the next attempt goes on from there"
                ) from error
            if attempts > 1:
                time.sleep(_SECONDS_BETWEEN_ATTEMPTS)

    def _attempt(self, start: int) -> Exception | None:
        """Download from a position to the end; return the error of a connection that broke."""
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.utils import (  # type: ignore[attr-defined]
            build_hf_headers,
            get_session,
            hf_raise_for_status,
        )

        file = self._file
        url = hf_hub_url(file.repository, file.path, revision=file.revision)
        headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        try:
            with (
                hub_errors(file.repository, file.revision, _REMEDY_OFFLINE),
                get_session().stream("GET", url, headers=headers, timeout=timeout, follow_redirects=True) as response,
            ):
                hf_raise_for_status(response)
                self._content.truncate(start if response.status_code == 206 else 0)
                self._content.seek(0, os.SEEK_END)
                for chunk in response.iter_bytes():
                    self._add(chunk)
        except TritGgufError as error:
            cause = error.__cause__
            if isinstance(cause, Exception) and is_transport_error(cause):
                return cause
            raise
        return None

    def _add(self, chunk: bytes) -> None:
        done = self._content.tell() + len(chunk)
        if done > self._file.n_bytes:
            raise DamagedFileError(f"{self._file.repository}: the hub sends more of {self._file.path} than it has told")
        with disk_errors(self._blob):
            self._content.write(chunk)
        self._progress(self._file.path, done, self._file.n_bytes)
        if done >= self._next_look:
            _check_head(self._file, self._content, self._next_look)
            self._next_look *= 2


def _check_content(file: RemoteFile, content: BinaryIO, progress: Progress) -> None:
    """Raise DamagedFileError unless a content has the hub's hash, and BadRequestError if it is no trit file."""
    digest, done = file.new_hash(), 0
    content.seek(0)
    while chunk := content.read(_CHUNK_BYTES):
        digest.update(chunk)
        done += len(chunk)
        progress(f"checking {file.path}", done, file.n_bytes)
    if digest.hexdigest() != file.digest:
        raise DamagedFileError(
            f"{file.repository}: what the hub has sent as {file.path} does not match its hash; it is removed, try again"
        )
    _check_head(file, content, file.n_bytes)


def _check_head(file: RemoteFile, content: BinaryIO, n_bytes: int) -> None:
    """Raise BadRequestError if the first bytes of a file tell that it is no trit file, DamagedFileError if no GGUF."""
    content.seek(0)
    head = content.read(n_bytes)
    content.seek(0, os.SEEK_END)
    if not head.startswith(MAGIC):
        raise DamagedFileError(f"{file.repository}: what the hub sends as {file.path} is no GGUF file; try again later")
    if head_has_key(head, KEY_VERSION) is False:
        raise BadRequestError(
            f"{file.repository}: {file.path} is no trit file; if the model has safetensors, make one:"
            f" {conversion_command(file.repository)}"
        )
