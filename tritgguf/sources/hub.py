"""Downloads from the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from tritgguf.errors import BadRequestError, TritGgufError

_HUB_PATTERNS = ["*.safetensors", "*.json", "tokenizer.model", "*.txt", "*.jinja", "README.md"]
# Subfolders and `consolidated` files repeat the weights in the vendors' own formats.
_HUB_IGNORED = ["*/*", "consolidated*"]


def download(hub_id: str, revision: str | None) -> Path:
    """Download a model into the local cache and return its folder; TritGgufError if that fails."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        folder = snapshot_download(
            hub_id, revision=revision, allow_patterns=_HUB_PATTERNS, ignore_patterns=_HUB_IGNORED
        )
    except GatedRepoError as error:
        raise TritGgufError(
            f"{hub_id}: access is gated; accept its terms on the hub and log in (`hf auth login`)"
        ) from error
    except RepositoryNotFoundError as error:
        raise BadRequestError(f"{hub_id}: no such file or folder here, and no such model on the hub") from error
    except RevisionNotFoundError as error:
        raise BadRequestError(f"{hub_id}: the hub has no revision {revision} of this model") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise TritGgufError(f"{hub_id}: the hub cannot be reached; give a local folder or go online") from error
    except Exception as error:  # the exception classes of transports depend on huggingface_hub's version
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise TritGgufError(f"{hub_id}: the download from the hub failed ({first_line})") from error
    return Path(folder)
