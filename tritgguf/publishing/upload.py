"""Uploading finished folders to the hub: a model there for each, and one line for each failure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tritgguf.errors import BadRequestError, TritGgufError
from tritgguf.evaluation.quantization_costs import Progress
from tritgguf.formats.file_kinds import is_hub_id
from tritgguf.sources.hub import first_line, is_transport_error

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_ALWAYS_THERE = {".gitattributes"}
_REMEDIES = {
    401: "does not accept the token of this machine; log in with one that may write (`hf auth login`)",
    403: "does not allow this account to write there; take another organization or a token that may write",
    429: "has had too many requests; try again in some minutes",
}


@dataclass(frozen=True)
class Upload:
    """A folder on its way to the hub; `error` is empty if it is there."""

    folder: str
    repository: str
    error: str = ""


def check_organization(organization: str) -> None:
    """Raise BadRequestError for what cannot be an organization or user on the hub."""
    if not is_hub_id(f"{organization}/name"):
        raise BadRequestError(f"--upload {organization}: is no name of an organization or user on the hub")


def upload_folders(folders: Sequence[Path], organization: str, progress: Progress) -> list[Upload]:
    """Upload each folder to the model of its name; a failure of one does not stop the others.

    A model that exists and does not have the folder's packed file is not ours and stays as it is. Files that are there
    already are not sent again.
    """
    from huggingface_hub import HfApi

    api, uploads = HfApi(), []
    for done, folder in enumerate(folders):
        repository = f"{organization}/{folder.name}"
        progress("upload", done, len(folders))
        try:
            with _upload_errors(repository):
                _upload(api, folder, repository)
            uploads.append(Upload(str(folder), repository))
        except TritGgufError as error:
            uploads.append(Upload(str(folder), repository, str(error)))
    progress("upload", len(folders), len(folders))
    return uploads


def _upload(api: HfApi, folder: Path, repository: str) -> None:
    api.create_repo(repository, repo_type="model", exist_ok=True)
    there = {file.rfilename for file in api.model_info(repository).siblings or []}
    packed = f"{folder.name}.gguf"
    if there - _ALWAYS_THERE and packed not in there:
        raise BadRequestError(f"{repository}: exists on the hub and has no {packed}, so it is not replaced; rename one")
    api.upload_folder(
        repo_id=repository,
        folder_path=folder,
        commit_message=f"Upload {folder.name}",
        ignore_patterns=["*.part", "*.part.*", ".*.partial/*"],
    )


@contextmanager
def _upload_errors(repository: str) -> Iterator[None]:
    """Turn an exception of huggingface_hub in the block into a TritGgufError of one line."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        yield
    except TritGgufError:
        raise
    except OfflineModeIsEnabled as error:
        raise TritGgufError(f"{repository}: not uploaded, because HF_HUB_OFFLINE is set; unset it") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        remedy = "is out of order; try again later" if status >= 500 else _REMEDIES.get(status)
        what = f"failed ({first_line(error)})" if remedy is None else f"failed: the hub {remedy}"
        raise TritGgufError(f"{repository}: the upload {what} (HTTP {status})") from error
    except Exception as error:  # the exception classes of transports depend on huggingface_hub's version
        why = "the hub cannot be reached; go online" if is_transport_error(error) else "the upload failed"
        raise TritGgufError(f"{repository}: {why} ({first_line(error)})") from error
