"""`tritgguf serve`: answer OpenAI's API, and show a chat page."""

from __future__ import annotations

import importlib
import importlib.util
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tritgguf.cli import terminal
from tritgguf.cli.loading import load_model
from tritgguf.cli.model_file import local_file
from tritgguf.cli.options import (
    CacheType,
    DecodeBits,
    DraftFile,
    DraftMax,
    InstructionSet,
    KeyType,
    Lookup,
    PrefillBits,
    Threads,
    TritFile,
    ValueType,
    one_cache_type,
    option,
)
from tritgguf.errors import MissingExtraError, TritGgufError

if TYPE_CHECKING:
    pass

_PACKAGES = ("fastapi", "uvicorn", "prometheus_client")

Host = Annotated[str, option("--host", metavar="NAME", help="Address to listen on.")]
Port = Annotated[int, option("--port", min=0, max=65535, help="Port to listen on; 0: a free one.")]
Context = Annotated[
    int, option("--ctx-size", "-c", min=0, help="Context of each answer in tokens; 0: the model's training context.")
]
Parallel = Annotated[int, option("--parallel", "-np", min=1, max=256, help="Answers that are generated at once.")]
Queue = Annotated[int, option("--queue", min=0, help="Requests that may wait; beyond, clients get a 503.")]
ApiKeys = Annotated[
    list[str] | None,
    option("--api-key", metavar="KEY", help="Key that requests must bring; may be repeated.", show_default=False),
]
ApiKeyFile = Annotated[
    Path | None,
    option("--api-key-file", metavar="FILE", help="File of such keys, one a line.", show_default=False),
]
CorsOrigins = Annotated[
    list[str] | None,
    option(
        "--cors-origin",
        metavar="ORIGIN",
        help="Origin whose pages may use the server, such as https://app.example; *: all; may be repeated.",
        show_default=False,
    ),
]
AllowedHosts = Annotated[
    list[str] | None,
    option(
        "--allowed-host",
        metavar="NAME",
        help="Further name by which clients may call the server, such as a proxy's; may be repeated.",
        show_default=False,
    ),
]
Alias = Annotated[str | None, option("--alias", metavar="NAME", help="The model's name.", show_default="the file's")]
Timeout = Annotated[float, option("--timeout", metavar="S", min=0.1, help="Seconds that an answer may take.")]
NoPage = Annotated[bool, typer.Option("--no-page", help="Do not serve the chat page.")]


def serve_command(
    file: TritFile,
    host: Host = "127.0.0.1",
    port: Port = 8080,
    context: Context = 0,
    parallel: Parallel = 8,
    queue: Queue = 64,
    threads: Threads = None,
    api_keys: ApiKeys = None,
    api_key_file: ApiKeyFile = None,
    cors_origins: CorsOrigins = None,
    allowed_hosts: AllowedHosts = None,
    alias: Alias = None,
    timeout: Timeout = 600.0,
    no_page: NoPage = False,
    prefill_bits: PrefillBits = 8,
    decode_bits: DecodeBits = 16,
    cache_type: CacheType = None,
    key_type: KeyType = None,
    value_type: ValueType = None,
    lookup: Lookup = False,
    draft: DraftFile = None,
    draft_max: DraftMax = 16,
    isa: InstructionSet = None,
) -> None:
    """Serve OpenAI's API and a chat page; Ctrl-C ends it.

    Example: tritgguf serve d3.gguf
    """
    _require_extra()
    from tritgguf.serving.address import listening_socket, url_of
    from tritgguf.serving.settings import ServerSettings

    options: dict[str, Any] = {"context": context or None, "parallel": parallel, "threads": threads, "isa": isa}
    options["cache_type"] = one_cache_type(cache_type, key_type, value_type)
    options |= {"prefill_bits": prefill_bits, "decode_bits": decode_bits}
    options |= {"lookup": lookup, "draft": draft, "draft_max": draft_max}
    settings = ServerSettings(
        host=host,
        port=port,
        alias=alias,
        api_keys=(*(api_keys or ()), *_keys_of(api_key_file)),
        allowed_hosts=tuple(allowed_hosts or ()),
        cors_origins=tuple(cors_origins or ()),
        queue=queue,
        timeout=timeout,
        page=not no_page,
    )
    if not all(settings.api_keys):
        raise TritGgufError("an API key must not be empty")
    file, bound = local_file(file), listening_socket(host, port)
    importing = threading.Thread(target=_import_packages, daemon=True)  # beside loading
    importing.start()
    model = load_model(file, **options)
    if not settings.api_keys and not _is_loopback(bound.getsockname()[0]):
        terminal.note("note: whoever reaches this machine can use the server; --api-key asks for a key")
    importing.join()
    from tritgguf.serving.server import serve

    serve(model, settings, bound, lambda: terminal.note(f"{url_of(bound)}  (Ctrl-C ends the server)"))


def _require_extra() -> None:
    """Raise MissingExtraError without the packages of the extra `server`."""
    if any(importlib.util.find_spec(package) is None for package in _PACKAGES):
        raise MissingExtraError("serve needs more packages: pip install fastapi uvicorn prometheus_client llguidance")


def _import_packages() -> None:
    """Import what takes long and has nothing in common with what loading a model imports."""
    for package in _PACKAGES:
        importlib.import_module(package)


def _keys_of(file: Path | None) -> list[str]:
    if file is None:
        return []
    from tritgguf.formats.text_file import read_text

    keys = [line.strip() for line in read_text(file).splitlines() if line.strip()]
    if not keys:
        raise TritGgufError(f"{file}: there is no key in it; write one on each line")
    return keys


def _is_loopback(address: str) -> bool:
    from ipaddress import ip_address

    return ip_address(address.partition("%")[0]).is_loopback
