"""Conversion of GGUF's `tokenizer.ggml.*` keys into the text of a tokenizer.json.

The supported architectures use two tokenizer types. Byte-level BPE (`gpt2` in GGUF: Llama 3, Qwen2, SmolLM2) splits
text with a regular expression, which GGUF stores only as a name, `tokenizer.ggml.pre`. SentencePiece BPE (`llama`:
Llama 2, TinyLlama, Mistral) has a score per token in GGUF and a list of merges in tokenizer.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from gguf import TokenType

from tritgguf.errors import DamagedFileError
from tritgguf.tokenization.tokenizer import tokenizer_errors

DEFAULT_PRE = "default"
SPACE_SIGN = "\u2581"  # SentencePiece's character for a space


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _byte_level(*, use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN35_SPLIT = _QWEN2_SPLIT.replace(r"\p{L}+", r"[\p{L}\p{M}]+").replace(r"[^\s\p{L}", r"[^\s\p{L}\p{M}")
_LLAMA3_SPLIT = _QWEN2_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
_TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_GPT4O_SPLIT = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}]*[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]+{_CONTRACTION}|"
    rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}]+[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]*{_CONTRACTION}|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# tokenizer.ggml.pre -> the pre-tokenizer steps in tokenizer.json. With ignore_merges, a word that is in the vocabulary
# becomes that token without merging; smaug-bpe is llama-bpe without ignore_merges.
PRE_TOKENIZERS: dict[str, list[dict[str, Any]]] = {
    "smollm": [{"type": "Digits", "individual_digits": True}, _byte_level(use_regex=True)],
    "gpt-2": [_byte_level(use_regex=True)],
    "qwen2": [_split(_QWEN2_SPLIT), _byte_level(use_regex=False)],
    "qwen35": [_split(_QWEN35_SPLIT), _byte_level(use_regex=False)],
    "llama-bpe": [_split(_LLAMA3_SPLIT), _byte_level(use_regex=False)],
    "smaug-bpe": [_split(_LLAMA3_SPLIT), _byte_level(use_regex=False)],
    "tekken": [_split(_TEKKEN_SPLIT), _byte_level(use_regex=False)],
    "gpt-4o": [_split(_GPT4O_SPLIT), _byte_level(use_regex=False)],
    "deepseek-r1-qwen": [_split(_QWEN2_SPLIT), _byte_level(use_regex=False)],
}
# What llama.cpp does for `default`, its name for a pre-tokenizer that its converter does not know.
_DEFAULT_STEPS = [
    _split(r"[\p{P}\$\+<=>\^~\|]+"),
    _split(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"),
    _split(r"\p{N}+"),
    _split(r"[0-9][0-9][0-9]"),
    _byte_level(use_regex=False),
]
_IGNORE_MERGES = ("llama-bpe", "tekken")
_SAME = {
    "llama-bpe": "llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2",
    "smollm": "refact starcoder command-r codeshell exaone minerva-7b",
    "gpt-2": "olmo mpt jais phi-2 trillion granite-docling exaone4 gigachat a.x-4.0 mellum",
    "smaug-bpe": "dbrx",
    "gpt-4o": "llama4 minimax-m2",
}
_OTHER_NAMES = {other: name for name, others in _SAME.items() for other in others.split()}
"""Other values of tokenizer.ggml.pre -> the name in PRE_TOKENIZERS that splits text in the same way."""


def tokenizer_json_from_gguf(
    metadata: Mapping[str, Any], where: str = "the GGUF file", *, prepend_scheme: str | None = None
) -> str:
    """Return a tokenizer.json that tokenizes text as llama.cpp does with these `tokenizer.ggml.*` keys.

    `prepend_scheme` makes SentencePiece's spaces as transformers' LlamaTokenizer does instead: a space before every
    part of a text between control tokens (always), before the first part (first), or never. Raises TritGgufError for
    keys that are missing or contradictory, and for an unsupported tokenizer.ggml.model or .pre: an almost correct
    tokenizer would be worse than none.
    """
    model = metadata.get("tokenizer.ggml.model")
    if model not in ("gpt2", "llama"):
        raise DamagedFileError(f"{where}: tokenizer.ggml.model is {model}; gpt2 and llama are supported")
    tokens = _list_of(metadata, "tokenizer.ggml.tokens", str, where)
    types = _list_of(metadata, "tokenizer.ggml.token_type", int, where, default=[TokenType.NORMAL] * len(tokens))
    if len(types) != len(tokens):
        raise DamagedFileError(f"{where}: has {len(tokens)} tokens but {len(types)} token types")
    vocabulary: dict[str, int] = {}
    for token_id, (token, token_type) in enumerate(zip(tokens, types, strict=True)):
        if token_type != TokenType.UNUSED:
            vocabulary.setdefault(token, token_id)
    added = [
        {
            "id": vocabulary[token],
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": token_type != TokenType.USER_DEFINED,
        }
        for token_id, (token, token_type) in enumerate(zip(tokens, types, strict=True))
        if token_type in (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED)
        and token
        and vocabulary[token] == token_id
    ]
    parts = _byte_level_parts if model == "gpt2" else _sentencepiece_parts
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        **parts(metadata, vocabulary, tokens, types, where),
        "post_processor": _post_processor(metadata, tokens, model, where),
    }
    if model == "llama" and prepend_scheme is not None:
        metaspace = {"replacement": SPACE_SIGN, "prepend_scheme": prepend_scheme, "split": False}
        tokenizer |= {"normalizer": None, "pre_tokenizer": {"type": "Metaspace", **metaspace}}
    text = json.dumps(tokenizer, ensure_ascii=False)
    check_loads(text, where)
    return text


def _byte_level_parts(
    metadata: Mapping[str, Any],
    vocabulary: dict[str, int],
    tokens: Sequence[str],
    types: Sequence[int],
    where: str,
) -> dict[str, Any]:
    pre = _pre_name(metadata)
    steps = _DEFAULT_STEPS if pre == DEFAULT_PRE else PRE_TOKENIZERS.get(pre)
    if steps is None:
        known = ", ".join(sorted([*PRE_TOKENIZERS, *_OTHER_NAMES, DEFAULT_PRE]))
        raise DamagedFileError(
            f"{where}: tokenizer.ggml.pre is {pre}, but only {known} are supported;"
            " convert the Hugging Face checkpoint instead, which has a tokenizer.json"
        )
    merges = merge_pairs(_list_of(metadata, "tokenizer.ggml.merges", str, where), where)
    model = {"type": "BPE", "ignore_merges": pre in _IGNORE_MERGES, "vocab": vocabulary, "merges": merges}
    return {
        "normalizer": {"type": "NFC"} if pre in ("qwen2", "qwen35") else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "decoder": _byte_level(use_regex=True),
        "model": model,
    }


def _sentencepiece_parts(
    metadata: Mapping[str, Any],
    vocabulary: dict[str, int],
    tokens: Sequence[str],
    types: Sequence[int],
    where: str,
) -> dict[str, Any]:
    scores = _list_of(metadata, "tokenizer.ggml.scores", (int, float), where)
    if len(scores) != len(tokens):
        raise DamagedFileError(f"{where}: has {len(tokens)} tokens but {len(scores)} scores")
    add_prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    space_to_sign = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_SIGN}
    sign_to_space = {"type": "Replace", "pattern": {"String": SPACE_SIGN}, "content": " "}
    prefix = [{"type": "Prepend", "prepend": SPACE_SIGN}] if add_prefix else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if add_prefix else []
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*prefix, space_to_sign]},
        "pre_tokenizer": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [sign_to_space, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip],
        },
        "model": {
            "type": "BPE",
            "unk_token": tokens[_special_id(metadata, "unknown", 0, tokens, where)],
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocabulary,
            "merges": _merges_from_scores(vocabulary, types, scores),
        },
    }


def _merges_from_scores(
    vocabulary: Mapping[str, int], types: Sequence[int], scores: Sequence[float]
) -> list[tuple[str, str]]:
    """Return all pairs of tokens that form a token: highest score first, then longest left part."""
    merges = []
    for token, token_id in vocabulary.items():
        if types[token_id] not in (TokenType.NORMAL, TokenType.USER_DEFINED):
            continue
        for cut in range(len(token) - 1, 0, -1):
            if token[:cut] in vocabulary and token[cut:] in vocabulary:
                merges.append((-scores[token_id], -cut, token[:cut], token[cut:]))
    merges.sort()
    return [(left, right) for _, _, left, right in merges]


def _post_processor(
    metadata: Mapping[str, Any], tokens: Sequence[str], model: str, where: str
) -> dict[str, Any] | None:
    """Return the template that adds bos and eos to a text as llama.cpp does; None if it adds neither."""
    adds_bos_by_default = model == "llama" or _pre_name(metadata) in _IGNORE_MERGES
    before: list[dict[str, Any]] = []
    after: list[dict[str, Any]] = []
    special: dict[str, Any] = {}
    for name, target, default_id, is_added in (
        ("bos", before, 1, metadata.get("tokenizer.ggml.add_bos_token", adds_bos_by_default)),
        ("eos", after, 2, metadata.get("tokenizer.ggml.add_eos_token", False)),
    ):
        if is_added is True:
            token_id = _special_id(metadata, name, default_id if model == "llama" else None, tokens, where)
            token = tokens[token_id]
            special[token] = {"id": token, "ids": [token_id], "tokens": [token]}
            target.append({"SpecialToken": {"id": token, "type_id": 0}})
    if not special:
        return None
    first, second = ([*before, {"Sequence": {"id": name, "type_id": 0}}, *after] for name in ("A", "B"))
    return {"type": "TemplateProcessing", "single": first, "pair": first + second, "special_tokens": special}


def _pre_name(metadata: Mapping[str, Any]) -> str:
    pre = str(metadata.get("tokenizer.ggml.pre", "missing"))
    return _OTHER_NAMES.get(pre, pre)


def _special_id(metadata: Mapping[str, Any], name: str, default: int | None, tokens: Sequence[str], where: str) -> int:
    key = f"tokenizer.ggml.{name}_token_id"
    token_id = metadata.get(key, default)
    if type(token_id) is not int or not 0 <= token_id < len(tokens):
        raise DamagedFileError(f"{where}: {key} is {token_id}, which is not a token id")
    return token_id


def merge_pairs(merges: Any, where: str) -> list[tuple[str, str]]:
    """Return merges as pairs; files before 2024 have strings `left right`."""
    if not isinstance(merges, list):
        raise DamagedFileError(f"{where}: has no list of merges")
    pairs = []
    for merge in merges:
        parts = merge.split(" ", 1) if isinstance(merge, str) else merge
        if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, str) for part in parts):
            raise DamagedFileError(f"{where}: the merge {merge!r} is not a pair of tokens")
        pairs.append((parts[0], parts[1]))
    return pairs


def _list_of(
    metadata: Mapping[str, Any],
    key: str,
    element_type: type | tuple[type, ...],
    where: str,
    default: list[Any] | None = None,
) -> list[Any]:
    values = metadata.get(key, default)
    if not isinstance(values, list) or not all(isinstance(value, element_type) for value in values):
        raise DamagedFileError(f"{where}: {key} is missing or has the wrong type")
    return values


def check_loads(text: str, where: str) -> None:
    """Raise TritGgufError unless the `tokenizers` library, which `run` uses, loads a tokenizer.json."""
    from tokenizers import Tokenizer

    with tokenizer_errors(f"{where}: the tokenizer is not valid"):
        Tokenizer.from_str(text)
