"""`tritgguf pull`: fetch a trit file from the hub."""

from __future__ import annotations

from typing import Annotated

import typer

from tritgguf.cli import terminal
from tritgguf.cli.model_file import hub_name
from tritgguf.cli.options import Json
from tritgguf.text_format import format_bytes

HubFile = Annotated[
    str,
    typer.Argument(
        help="A trit file's name on the hub: ORG/NAME, or ORG/NAME:d2 or ORG/NAME:FILE if there are several.",
        metavar="NAME",
    ),
]


def pull_command(name: HubFile, as_json: Json = False) -> None:
    """Fetch a trit file from the hub, or its newest version, into huggingface_hub's cache.

    A broken download is resumed. The file is there when its size and hash are right.

    Example: tritgguf pull ORG/NAME:d2
    """
    from tritgguf.sources.hub_files import pull

    wanted = hub_name(name)
    with terminal.progress(in_bytes=True) as report:
        file = pull(wanted, report)
    if as_json:
        terminal.print_json(file.as_dict())
    else:
        print(file.location)
        terminal.note(f"{file.repository}: {file.path}, {format_bytes(file.n_bytes)}; run it: tritgguf run {name}")
