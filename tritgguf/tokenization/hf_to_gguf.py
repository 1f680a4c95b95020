"""Conversion of the tokenizer of a Hugging Face folder into GGUF's `tokenizer.*` keys.

The keys, their order and the rules for token types are those of llama.cpp's convert_hf_to_gguf.py. `gguf_to_hf`
converts in the other direction and describes the two tokenizer types.
"""

from __future__ import annotations

import json
import logging
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gguf import GGUFWriter, SpecialVocab, TokenType

from tritgguf.errors import DamagedFileError
from tritgguf.formats.checked import is_unicode, read_json
from tritgguf.tokenization.gguf_to_hf import (
    PRE_TOKENIZERS,
    SPACE_SIGN,
    merge_pairs,
    tokenizer_json_from_gguf,
)
from tritgguf.tokenization.hf_folder_reader import (
    SPECIAL_NAMES,
    TokenizerFolder,
    complete_json,
    read_tokenizer_folder,
    special_text,
)
from tritgguf.tokenization.sentencepiece_model import Piece, read_pieces
from tritgguf.tokenization.tokenizer import KEY_STOP_IDS, named_stops

if TYPE_CHECKING:
    from gguf import GGUFValue

__all__ = ["HUGGINGFACE_JSON_KEY", "tokenizer_json_from_gguf", "tokenizer_metadata"]

HUGGINGFACE_JSON_KEY = "tokenizer.huggingface.json"

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
# Control tokens that some models do not mark as special.
_LOOKS_SPECIAL = re.compile(r"<\|.*\|>|<\uff5c.*\uff5c>|<unused.*>|<pad>|<mask>|<2mass>|\[@BOS@\]", re.DOTALL)
# SmolLM2 and Granite do not use a bos token; llama.cpp's converter recognizes them by their vocabulary size.
_VOCABULARY_WITHOUT_BOS = 49152


@contextmanager
def _quiet_gguf() -> Iterator[None]:
    """Suppress gguf-py's log messages, which the user can do nothing about."""
    logger, handler = logging.getLogger("gguf"), logging.NullHandler()
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


@_quiet_gguf()
def tokenizer_metadata(
    folder: Path, vocabulary: int, *, add_space_prefix_key: bool
) -> tuple[dict[str, GGUFValue], list[str]]:
    """Return the `tokenizer.*` keys of a Hugging Face folder, and warnings.

    `vocabulary` is the number of rows of the embedding; ids without a token become unused tokens `[PAD<id>]`.
    `add_space_prefix_key`: whether to write add_prefix_space of tokenizer_config.json (architecture `llama`). If
    tokenizer.json is missing, it is made from tokenizer.model. Raises TritGgufError if both are missing, if a file is
    damaged and if the tokenizer type is not supported.
    """
    files = read_tokenizer_folder(folder)
    writer = GGUFWriter(path=None, arch="")
    warnings = list(files.warnings)
    if add_space_prefix_key and isinstance(files.config.get("add_prefix_space"), bool):
        writer.add_add_space_prefix(files.config["add_prefix_space"])
    if files.tokenizer is None or _is_sentencepiece(files.tokenizer, files.where):
        _add_sentencepiece(writer, files, vocabulary)
    else:
        warnings += _add_byte_level(writer, files.tokenizer, files.added, vocabulary, files.where)
        writer.add_token_merges(_merge_texts(files.tokenizer["model"], files.where))
    _add_special(writer, files, vocabulary)
    _add_stop_ids(writer, files, vocabulary)
    if files.chat_template is not None:
        writer.add_chat_template(files.chat_template)
        if names := writer.kv_data[0].get("tokenizer.chat_templates"):
            names.value.sort()  # gguf-py collects them in a set
    if add_space_prefix_key and vocabulary == _VOCABULARY_WITHOUT_BOS:
        writer.add_add_bos_token(False)
    metadata = {key: value for key, value in writer.kv_data[0].items() if key.startswith("tokenizer.")}
    for key, value in metadata.items():
        texts = value.value if isinstance(value.value, list) else [value.value]
        if not is_unicode("".join(text for text in texts if isinstance(text, str))):
            raise DamagedFileError(f"{folder}: {key} would contain half of a surrogate pair, which is not a character")
    if files.tokenizer is not None:
        text = complete_json(files)
    else:
        values = {key: value.value for key, value in metadata.items()}
        text = tokenizer_json_from_gguf(values, where=files.where, prepend_scheme=_prepend_scheme(files.config))
    writer.add_string(HUGGINGFACE_JSON_KEY, text)
    return {**metadata, HUGGINGFACE_JSON_KEY: writer.kv_data[0][HUGGINGFACE_JSON_KEY]}, warnings


def _prepend_scheme(config: Mapping[str, Any]) -> str:
    """Return where transformers' LlamaTokenizer puts a space before text."""
    if config.get("add_prefix_space") is False:
        return "never"
    return "always" if config.get("legacy") is True else "first"


def _is_sentencepiece(tokenizer: Mapping[str, Any], where: str) -> bool:
    """Return True for SentencePiece BPE, False for byte-level BPE; TritGgufError for other types."""
    model = tokenizer.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or not isinstance(model.get("vocab"), dict):
        model_type = model.get("type") if isinstance(model, dict) else None
        raise DamagedFileError(f"{where}: a tokenizer of type {model_type} is not supported (BPE is)")
    if model.get("byte_fallback"):
        return True
    if "ByteLevel" not in (step[0] for step in _signature(tokenizer.get("pre_tokenizer"))):
        raise DamagedFileError(
            f"{where}: its BPE works neither on bytes (ByteLevel) nor with byte_fallback; not supported"
        )
    return False


def _added_type(entry: Mapping[str, Any]) -> tuple[str, int]:
    """Return an added token's text and type. User-defined tokens match plain text, so their spaces are plain."""
    text = entry["content"]
    if entry.get("special") or _LOOKS_SPECIAL.fullmatch(text):
        return text, TokenType.CONTROL
    return text.replace(SPACE_SIGN, " "), TokenType.USER_DEFINED


def _check_id(token_id: Any, vocabulary: int, where: str) -> int:
    if type(token_id) is not int or not 0 <= token_id < vocabulary:
        raise DamagedFileError(
            f"{where}: token id {token_id!r} does not fit config.json's vocab_size of {vocabulary}; remove the token,"
            " or give the model a row for it (resize_token_embeddings in transformers)"
        )
    return token_id


def _add_byte_level(
    writer: GGUFWriter, tokenizer: Mapping[str, Any], added: Mapping[int, Any], vocabulary: int, where: str
) -> list[str]:
    tokens = [f"[PAD{token_id}]" for token_id in range(vocabulary)]
    types: list[int] = [TokenType.UNUSED] * vocabulary
    for text, token_id in tokenizer["model"]["vocab"].items():
        tokens[_check_id(token_id, vocabulary, where)] = text
        types[token_id] = TokenType.NORMAL
    for token_id, entry in added.items():
        tokens[_check_id(token_id, vocabulary, where)], types[token_id] = _added_type(entry)
    pre = _recognize_pre_tokenizer(tokenizer)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre or "default")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if pre is not None:
        return []
    warning = (
        f"{where}: its pre-tokenizer is unknown, so tokenizer.ggml.pre is `default`;"
        " tokenizer.huggingface.json is correct, but llama.cpp may split text differently"
    )
    return [warning]


def _add_sentencepiece(writer: GGUFWriter, files: TokenizerFolder, vocabulary: int) -> None:
    where, model_path = files.where, files.model_path
    if model_path.is_file():
        pieces = read_pieces(model_path)
    else:
        pieces = _pieces_from_json(files.tokenizer or {}, vocabulary, where)
    if len(pieces) > vocabulary:
        raise DamagedFileError(f"{where}: has {len(pieces)} tokens, more than config.json's vocab_size of {vocabulary}")
    pieces += [Piece(f"[PAD{token_id}]", -10000.0, TokenType.UNUSED) for token_id in range(len(pieces), vocabulary)]
    for token_id, entry in files.added.items():
        text, token_type = _added_type(entry)
        pieces[_check_id(token_id, vocabulary, where)] = Piece(text, -1000.0, token_type)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([piece.text for piece in pieces])
    writer.add_token_scores([piece.score for piece in pieces])
    writer.add_token_types([piece.type for piece in pieces])


def _pieces_from_json(tokenizer: Mapping[str, Any], vocabulary: int, where: str) -> list[Piece]:
    """Return the pieces of the tokenizer.model that corresponds to a tokenizer.json.

    SentencePiece gives the n-th merged token the score -n, in the order of the merges of tokenizer.json. Tokens that no
    merge forms (single characters, bytes) never compete, so their scores do not matter.
    """
    model = tokenizer["model"]
    merges = merge_pairs(model.get("merges"), where)
    rank = {token: index for index, token in enumerate(dict.fromkeys(left + right for left, right in merges))}
    highest = max((_check_id(token_id, vocabulary, where) for token_id in model["vocab"].values()), default=-1)
    pieces = [Piece(f"[PAD{token_id}]", -10000.0, TokenType.UNUSED) for token_id in range(highest + 1)]
    for text, token_id in model["vocab"].items():
        if text == model.get("unk_token"):
            pieces[token_id] = Piece(text, 0.0, TokenType.UNKNOWN)
        elif _BYTE_TOKEN.fullmatch(text):
            pieces[token_id] = Piece(text, 0.0, TokenType.BYTE)
        else:
            pieces[token_id] = Piece(text, -float(rank.get(text, len(rank))), TokenType.NORMAL)
    return pieces


def _merge_texts(model: Mapping[str, Any], where: str) -> list[str]:
    """Return the merges as GGUF has them, `left right`; a space inside a part is its byte's letter."""
    return [" ".join(part.replace(" ", "\u0120") for part in pair) for pair in merge_pairs(model.get("merges"), where)]


def _add_special(writer: GGUFWriter, files: TokenizerFolder, vocabulary: int) -> None:
    """Add special token ids and add_bos_token etc. with gguf-py, which follows llama.cpp's converter.

    It reads them from files, so it gets what they mean together: added tokens of any file, plain UTF-8.
    """
    entries = [{**entry, "id": token_id} for token_id, entry in files.added.items()]
    tokens: list[str] = writer.kv_data[0]["tokenizer.ggml.tokens"].value
    ids = {text: token_id for token_id, text in enumerate(tokens)}
    for name in SPECIAL_NAMES:
        if (text := special_text(files.config, name)) in ids and files.tokenizer is None:
            entries.append({"id": ids[text], "content": text})
    processor = None if files.tokenizer is None else files.tokenizer.get("post_processor")
    config = read_json(files.folder / "config.json") if (files.folder / "config.json").is_file() else {}
    staged = {
        "tokenizer.json": {"added_tokens": entries, "post_processor": processor},
        "tokenizer_config.json": files.config,
        "config.json": {key: value for key, value in config.items() if key.endswith("_token_id")},
    }
    if files.stop_ids and not isinstance(config.get("eos_token_id"), int):
        staged["config.json"]["eos_token_id"] = files.stop_ids[0]
    for key, value in staged["config.json"].items():
        if isinstance(value, int) and value < 0:  # means that there is none
            staged["config.json"][key] = None
    try:
        with tempfile.TemporaryDirectory(prefix="tritgguf-") as temporary:
            for name, value in staged.items():
                (Path(temporary) / name).write_text(json.dumps(value), encoding="utf-8")
            SpecialVocab(temporary, n_vocab=vocabulary).add_to_gguf(writer, quiet=True)
    except Exception as error:  # gguf-py does not check the files, so any exception is possible
        raise DamagedFileError(f"{files.folder}: the tokenizer's JSON files are damaged ({error!r})") from error


def _add_stop_ids(writer: GGUFWriter, files: TokenizerFolder, vocabulary: int) -> None:
    """Add the tokens at which `model.generate` stops, if `run` would not know them all.

    llama.cpp reads three of them: eos, and the keys of the ends of a turn and of a message. It knows others by name.
    """
    keys, stops = writer.kv_data[0], [token for token in files.stop_ids if token < vocabulary]
    id_keys = {name: f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom")}
    known = {keys[key].value for key in id_keys.values() if key in keys}
    known |= named_stops({entry["content"]: token_id for token_id, entry in files.added.items()})
    unknown = [token for token in stops if token not in known]
    for token, name in zip(unknown, [name for name, key in id_keys.items() if key not in keys], strict=False):
        getattr(writer, f"add_{name}_token_id")(token)
    if unknown:
        writer.add_array(KEY_STOP_IDS, stops)


def _signature(pre_tokenizer: Any, nesting: int = 0) -> list[tuple[Any, ...]]:
    """Return what determines a pre-tokenizer's splits: one tuple per step, nested sequences flattened."""
    if not isinstance(pre_tokenizer, dict):
        return []
    step_type = pre_tokenizer.get("type")
    if step_type == "Sequence" and nesting < 4 and isinstance(steps := pre_tokenizer.get("pretokenizers"), list):
        return [part for step in steps for part in _signature(step, nesting + 1)]
    if step_type == "Split" and isinstance(pattern := pre_tokenizer.get("pattern"), dict):
        return [(step_type, pattern.get("Regex"))]
    if step_type == "Digits":
        return [(step_type, bool(pre_tokenizer.get("individual_digits")))]
    if step_type == "ByteLevel":
        return [(step_type, bool(pre_tokenizer.get("use_regex", True)))]
    return [(step_type,)]


def _recognize_pre_tokenizer(tokenizer: Mapping[str, Any]) -> str | None:
    """Return the name for tokenizer.ggml.pre, or None if the pre-tokenizer is unknown.

    llama.cpp's converter compares a hash of a test text's token ids, which works only for known vocabularies. We
    compare the steps themselves, which works for every fine-tune.
    """
    signature = _signature(tokenizer.get("pre_tokenizer"))
    for name, steps in PRE_TOKENIZERS.items():
        if [part for step in steps for part in _signature(step)] == signature:
            if name == "llama-bpe" and not tokenizer["model"].get("ignore_merges"):
                continue
            return name
    return None
