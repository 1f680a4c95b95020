"""`tritgguf list`: show the trit files in the hub's cache."""

from __future__ import annotations

from tritgguf.cli import terminal
from tritgguf.cli.options import Json
from tritgguf.text_format import format_bytes


def list_command(as_json: Json = False) -> None:
    """Show the trit files in huggingface_hub's cache, by the names that the other commands take.

    KL is the divergence from the source, of files that record it (`verify --write`).

    Example: tritgguf list
    """
    from tritgguf.sources.hub_cache import cache_folder, files_in_cache
    from tritgguf.sources.hub_names import short_name

    found = files_in_cache()
    for damage in filter(None, (file.damage for file in found)):
        terminal.note(f"warning: {damage}")
    files = [file for file in found if file.is_trit_file]
    names = [short_name(file.repository, file, [f for f in files if f.repository == file.repository]) for file in files]
    if as_json:
        terminal.print_json([{"name": name, **file.as_dict()} for name, file in zip(names, files, strict=True)])
        return
    if not files:
        terminal.note(f"there is no trit file in {cache_folder()}; fetch one: tritgguf pull ORG/NAME")
        return
    rows = []
    for name, file in zip(names, files, strict=True):
        kl = "" if file.score is None else f"{file.score.kl_mean:.4f}"
        rows.append((name, file.depth, format_bytes(file.n_bytes), file.encoder, kl))
    terminal.print_table(f"Trit files in {cache_folder()}", ("name", ">depth", ">size", "encoder", ">KL"), rows)
