"""`tritgguf rm`: remove a trit file from the hub's cache."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from tritgguf.cli import terminal
from tritgguf.cli.model_file import hub_name
from tritgguf.cli.options import Json, UsageError
from tritgguf.cli.pull import HubFile
from tritgguf.errors import BadRequestError
from tritgguf.text_format import format_bytes


def rm_command(
    name: HubFile,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Remove it without asking.")] = False,
    as_json: Json = False,
) -> None:
    """Remove a trit file from huggingface_hub's cache; nothing else there, and no other file, is touched.

    Example: tritgguf rm ORG/NAME:d2
    """
    from tritgguf.sources.hub_cache import files_in_cache, find_cached, remove_from_cache
    from tritgguf.sources.hub_names import the_chosen

    chosen = hub_name(name)
    damaged = [file for file in files_in_cache(chosen.repository) if file.damage]
    file = find_cached(chosen) or the_chosen(chosen, damaged)
    if file is None:
        raise BadRequestError(f"{name}: is no trit file in the cache; `tritgguf list` shows those that are")
    if not yes:
        if as_json or not sys.stdin.isatty():
            raise UsageError("rm asks before it removes a file, which needs a terminal; --yes answers")
        typer.confirm(f"Remove {file.path} of {file.repository} ({format_bytes(file.n_bytes)})?", abort=True, err=True)
    freed = remove_from_cache(file)
    if as_json:
        terminal.print_json({"repository": file.repository, "file": file.path, "freed_bytes": freed})
    else:
        terminal.note(f"removed {file.path} of {file.repository}; {format_bytes(freed)} are free again")
