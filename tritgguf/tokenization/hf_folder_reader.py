"""Reading the tokenizer files of a Hugging Face folder with the meaning that transformers gives them.

Newer files win over older ones that say the same: added_tokens_decoder in tokenizer_config.json over
special_tokens_map.json and added_tokens.json, chat_template.jinja over an entry of tokenizer_config.json,
generation_config.json over config.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tritgguf.errors import DamagedFileError
from tritgguf.formats.checked import check_inside, read_json
from tritgguf.formats.text_file import read_text
from tritgguf.tokenization.tokenizer import tokenizer_errors

ChatTemplate = str | list[dict[str, str]]
"""A chat template, or several with names: objects with `name` and `template`."""
SPECIAL_NAMES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_MODEL, _JSON, _CONFIG = "tokenizer.model", "tokenizer.json", "tokenizer_config.json"
_REMEDY = (
    "save the tokenizer with the model (in transformers: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER))"
)


@dataclass(frozen=True)
class TokenizerFolder:
    """The tokenizer of a folder.

    Attributes:
        folder: the folder.
        where: the file with the vocabulary, for messages: tokenizer.json or tokenizer.model.
        tokenizer: tokenizer.json; None if there is only tokenizer.model.
        config: tokenizer_config.json with the special tokens of older files; empty if there is none.
        added: id -> entry (`content`, `special` ...) of the added tokens of all files.
        chat_template: one template, or several with names as in tokenizer_config.json; None if there is none.
        stop_ids: the tokens at which `model.generate` stops.
        warnings: one line each.

    """

    folder: Path
    where: str
    tokenizer: dict[str, Any] | None
    config: dict[str, Any]
    added: dict[int, dict[str, Any]]
    chat_template: ChatTemplate | None
    stop_ids: list[int]
    warnings: list[str] = field(default_factory=list)

    @property
    def model_path(self) -> Path:
        """SentencePiece's file, which need not exist."""
        return self.folder / _MODEL


def read_tokenizer_folder(folder: Path) -> TokenizerFolder:
    """Read a folder; TritGgufError if it has neither tokenizer.json nor tokenizer.model, or if a file is damaged."""
    tokenizer = _optional_json(folder / _JSON) if (folder / _JSON).is_file() else None
    if tokenizer is None and not (folder / _MODEL).is_file():
        others = [name for name in ("vocab.json", "tiktoken.model", "tekken.json") if (folder / name).is_file()]
        has = f"only {others[0]}, which is not supported" if others else "no tokenizer.json and no tokenizer.model"
        raise DamagedFileError(f"{folder}: has {has}; {_REMEDY}")
    where = str(folder / (_MODEL if tokenizer is None else _JSON))
    config = _optional_json(folder / _CONFIG)
    has_decoder = "added_tokens_decoder" in config
    if not has_decoder:
        config |= _optional_json(folder / "special_tokens_map.json")
    added = _decoder_entries(folder, config) if has_decoder else _legacy_entries(folder, config)
    added |= _entries((tokenizer or {}).get("added_tokens") or [], where)
    warnings: list[str] = []
    template = _chat_template(folder, config.pop("chat_template", None), warnings)
    return TokenizerFolder(folder, where, tokenizer, config, added, template, _stop_ids(folder), warnings)


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _entries(entries: Any, where: str) -> dict[int, dict[str, Any]]:
    if not isinstance(entries, list):
        raise DamagedFileError(f"{where}: added_tokens is not a list; fetch the file again")
    added = {}
    for entry in entries:
        if not isinstance(entry, dict) or type(entry.get("id")) is not int or not isinstance(entry.get("content"), str):
            raise DamagedFileError(f"{where}: an entry of added_tokens has no id or no content; fetch the file again")
        added[entry["id"]] = entry
    return added


def _decoder_entries(folder: Path, config: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """Return the added tokens of tokenizer_config.json."""
    decoder = config["added_tokens_decoder"]
    if not isinstance(decoder, dict) or not all(key.isdecimal() and isinstance(e, dict) for key, e in decoder.items()):
        raise DamagedFileError(f"{folder / _CONFIG}: added_tokens_decoder is damaged; fetch the file again")
    return _entries([{**entry, "id": int(key)} for key, entry in decoder.items()], str(folder / _CONFIG))


def _legacy_entries(folder: Path, config: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """Return the added tokens of added_tokens.json, text -> id; special are those that the configuration names."""
    path = folder / "added_tokens.json"
    special = {special_text(config, name) for name in SPECIAL_NAMES}
    for key in ("additional_special_tokens", "extra_special_tokens"):
        named = config.get(key)
        special.update(map(_text, named) if isinstance(named, list) else [])
    entries = []
    for text, token_id in _optional_json(path).items():
        is_special = text in special
        entries.append({"id": token_id, "content": text, "special": is_special, "normalized": not is_special})
    return _entries(entries, str(path))


def _text(token: Any) -> str | None:
    """Return the text of a token, which is a string or an object with `content`."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def special_text(config: Mapping[str, Any], name: str) -> str | None:
    """Return the text of a special token, such as `eos`, in tokenizer_config.json; None if it has none."""
    return _text(config.get(f"{name}_token"))


def complete_json(files: TokenizerFolder) -> str:
    """Return tokenizer.json with the added tokens that only other files name, as transformers adds them.

    Raises DamagedFileError if the `tokenizers` library, which `run` uses, does not load it or gives other ids.
    """
    from tokenizers import Tokenizer

    assert files.tokenizer is not None
    text, own = read_text(files.folder / _JSON), files.tokenizer.get("added_tokens") or []
    known = {entry["id"] for entry in own}
    missing = {token_id: entry for token_id, entry in sorted(files.added.items()) if token_id not in known}
    if missing:
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
        entries = [{**flags, "normalized": True, "special": False, **entry} for entry in missing.values()]
        text = json.dumps({**files.tokenizer, "added_tokens": [*own, *entries]})
    with tokenizer_errors(f"{files.where}: the tokenizer is not valid"):
        loaded = Tokenizer.from_str(text)
    for token_id, entry in missing.items():
        if loaded.token_to_id(entry["content"]) != token_id:
            raise DamagedFileError(
                f"{files.where}: has no token {token_id}, which another file names {entry['content']}; {_REMEDY}"
            )
    return text


def _chat_template(folder: Path, entry: Any, warnings: list[str]) -> ChatTemplate | None:
    """Return the chat template that transformers uses; add a warning if there is another one."""
    configured = _checked_template(entry, folder / _CONFIG)
    path = folder / "chat_template.jinja"
    files = {"default": path} if path.is_file() else {}
    files |= {file.stem: file for file in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    for file in files.values():
        check_inside(file)
    if not files:
        # Processors of text and images have a file of their own, which tokenizers do not read.
        other = folder / "chat_template.json"
        return configured or _checked_template(_optional_json(other).get("chat_template"), other)
    templates = [{"name": name, "template": read_text(file)} for name, file in files.items()]
    chosen = templates[0]["template"] if list(files) == ["default"] else templates
    if configured is not None and configured != chosen:
        warnings.append(
            f"{folder}: {' and '.join(file.name for file in files.values())} and {_CONFIG} have different chat"
            " templates; the one in its own file is used, as transformers does"
        )
    return chosen


def _checked_template(entry: Any, path: Path) -> ChatTemplate | None:
    """Return the entry chat_template of a file: a text, or named texts as a list or an object."""
    if entry is None or isinstance(entry, str):
        return entry
    named = [{"name": name, "template": text} for name, text in entry.items()] if isinstance(entry, dict) else entry
    if not isinstance(named, list) or not all(
        isinstance(item, dict) and isinstance(item.get("name"), str) and isinstance(item.get("template"), str)
        for item in named
    ):
        raise DamagedFileError(f"{path}: chat_template is neither a text nor a list of named texts; fetch it again")
    return named


def _stop_ids(folder: Path) -> list[int]:
    """Return the ids of eos_token_id, a number or a list, in generation_config.json, or else in config.json."""
    for name in ("generation_config.json", "config.json"):
        entry = _optional_json(folder / name).get("eos_token_id")
        ids = [token for token in (entry if isinstance(entry, list) else [entry]) if type(token) is int and token >= 0]
        if ids:
            return list(dict.fromkeys(ids))
    return []
