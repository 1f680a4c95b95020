"""Access to the Hugging Face hub: its errors as single lines, and the download of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tritgguf.errors import BadRequestError, TritGgufError
from tritgguf.text_format import one_line

_HUB_PATTERNS = ["*.safetensors", "*.json", "tokenizer.model", "*.txt", "*.jinja", "README.md"]
# Subfolders and `consolidated` files repeat the weights in the vendors' own formats.
_HUB_IGNORED = ["*/*", "consolidated*"]
_REMEDIES = {
    401: "does not accept the token of this machine; log in again (`hf auth login`) or unset HF_TOKEN",
    403: "does not allow this access; log in with an account that has it (`hf auth login`)",
    429: "has had too many requests; try again{later}",
}


def download(hub_id: str, revision: str | None) -> Path:
    """Download a model into the local cache and return its folder; TritGgufError if that fails."""
    from huggingface_hub import snapshot_download

    with hub_errors(hub_id, revision, "give a local folder or go online"):
        folder = snapshot_download(
            hub_id, revision=revision, allow_patterns=_HUB_PATTERNS, ignore_patterns=_HUB_IGNORED
        )
    return Path(folder)


@contextmanager
def hub_errors(hub_id: str, revision: str | None, remedy_offline: str) -> Iterator[None]:
    """Turn an exception of huggingface_hub in the block into a TritGgufError of one line, which names the remedy."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except TritGgufError:
        raise
    except GatedRepoError as error:
        raise TritGgufError(
            f"{hub_id}: access is gated; accept its terms on the hub and log in (`hf auth login`)"
        ) from error
    except RepositoryNotFoundError as error:
        raise BadRequestError(f"{hub_id}: no such file or folder here, and no such model on the hub") from error
    except RevisionNotFoundError as error:
        raise BadRequestError(f"{hub_id}: the hub has no revision {revision} of this model") from error
    except OfflineModeIsEnabled as error:
        raise TritGgufError(
            f"{hub_id}: the hub cannot be reached, because HF_HUB_OFFLINE is set; {remedy_offline}"
        ) from error
    except LocalEntryNotFoundError as error:
        raise TritGgufError(f"{hub_id}: the hub cannot be reached; {remedy_offline}") from error
    except HfHubHTTPError as error:
        raise TritGgufError(f"{hub_id}: {_refusal(error)}") from error
    except Exception as error:  # the exception classes of transports depend on huggingface_hub's version
        if is_transport_error(error):
            why = f" ({first_line(error)})"
            raise TritGgufError(f"{hub_id}: the hub cannot be reached{why}; {remedy_offline}") from error
        raise TritGgufError(f"{hub_id}: the download from the hub failed ({first_line(error)})") from error


def is_transport_error(error: Exception) -> bool:
    """Tell whether an exception comes from the connection: refused, broken, too slow."""
    from huggingface_hub.errors import HfHubHTTPError

    classes = {f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(error).__mro__}
    transports = ("httpx.TransportError", "httpx2.TransportError", "requests.RequestException")
    return not isinstance(error, HfHubHTTPError) and not classes.isdisjoint(transports)


def first_line(error: Exception) -> str:
    """Return the first line of an exception's message, or its type."""
    return one_line((str(error).strip().splitlines() or [""])[0]) or type(error).__name__


def _refusal(error: Exception) -> str:
    """Return what an HTTP status of the hub means, and the remedy."""
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if not isinstance(status, int) or response is None:
        return f"the download from the hub failed ({first_line(error)})"
    remedy = "is out of order; try again later" if status >= 500 else _REMEDIES.get(status)
    if remedy is None:
        return f"the download from the hub failed ({first_line(error)})"
    wait = response.headers.get("Retry-After", "")
    return f"the hub {remedy.format(later=f' in {wait} s' if wait.isdigit() else ' in some minutes')} (HTTP {status})"
