"""A server that tells, when SIGTERM has ended it, whether a page of keys and values has leaked.

    python -m tools.speed.checked_server FILE --parallel 8 --context 4096

It prints its URL, and at the end {"leaked": false}, or the reason why it is true. `serve_load` uses it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from tools import tool_command
from tritgguf.generation.loaded_model import load
from tritgguf.serving.address import listening_socket, url_of
from tritgguf.serving.server import serve
from tritgguf.serving.settings import ServerSettings


def main(
    file: Annotated[Path, typer.Argument(help="A trit file.")],
    parallel: Annotated[int, typer.Option(help="Answers at once.")] = 8,
    context: Annotated[int, typer.Option(help="Context of each, in tokens.")] = 4096,
    queue: Annotated[int, typer.Option(help="Requests that may wait.")] = 64,
    threads: Annotated[int | None, typer.Option("--threads", "-t", min=1)] = None,
    decode_bits: Annotated[int, typer.Option(help="Bits of generated tokens' activations, 8 or 16.")] = 16,
) -> None:
    """Serve a model."""
    settings, bound = ServerSettings(queue=queue, shutdown_seconds=2, page=False), listening_socket("127.0.0.1", 0)
    model = load(file, context=context, parallel=parallel, threads=threads, decode_bits=decode_bits)
    serve(model, settings, bound, lambda: print(url_of(bound), flush=True))
    result = {"leaked": False, "reason": ""}
    try:
        model.engine.check()
        model.engine.clear_prefix_cache()
        model.engine.check()
        pool = model.engine.pool
        assert pool.free_pages == len(pool.references), "pages are held by nobody"
        assert pool.free_sequences == parallel, "sequences are held by nobody"
    except AssertionError as error:
        result = {"leaked": True, "reason": str(error)}
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    tool_command.run(main)
