"""A model with its tokenizer and an engine, loaded from a file: what the package's users hold."""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from tritgguf.errors import BadRequestError
from tritgguf.generation.log_softmax import log_softmax
from tritgguf.generation.prompt_format import PromptFormat
from tritgguf.generation.request import Request, Wanted
from tritgguf.generation.result import Score
from tritgguf.tokenization.tokenizer import Tokenizer

if TYPE_CHECKING:
    from tritgguf.formats.gguf_file import GgufFile
    from tritgguf.generation.engine import Engine
    from tritgguf.generation.speculation import Speculation
    from tritgguf.runtime.model import Model


OnDownload = Callable[[str, int, int], None]
"""Called while a file is fetched: what is done, the bytes done and their total."""


@dataclass(eq=False)
class LoadedModel(PromptFormat):
    """A model ready to generate; all of it may be used from several threads at once.

    Attributes:
        path, tokenizer, chat_template: as in `PromptFormat`.
        load_seconds: how long loading took; compiling not counted.

    """

    load_seconds: float
    engine: Engine = field(repr=False)

    @property
    def context(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        return self.engine.context

    @property
    def trained_context(self) -> int:
        """Tokens that the model was trained to see together."""
        return self.engine.model.config.context_length

    def logits(self, tokens: Sequence[int] | str, *, first: int = 0) -> np.ndarray:
        """Return the logits behind each token of a text.

        Args:
            tokens: token ids, or a text, which gets the BOS token where the model uses one.
            first: the token to begin with, counted from 0; the logits behind earlier ones are left out.

        Returns:
            float32 [tokens - first, vocabulary].

        Raises:
            TritGgufError: no tokens, more than the context holds, or one that does not exist; `first` is none of them.

        """
        return self._outputs(self._tokens(tokens), "logits", operator.index(first))

    def embed(
        self, text: Sequence[int] | str, *, pooling: Literal["mean", "last"] = "mean", normalize: bool = True
    ) -> np.ndarray:
        """Return an embedding of a text: the mean of the final hidden states, or the last token's.

        Args:
            text: a text or token ids, as in `logits`.
            pooling: "mean" or "last".
            normalize: whether the embedding gets the length 1.

        Returns:
            float32 [hidden].

        Raises:
            TritGgufError: as `logits`, or a pooling of another name.

        """
        if pooling not in ("mean", "last"):
            raise BadRequestError(f'pooling is "mean" or "last", not {pooling!r:.60}')
        tokens = self._tokens(text)
        states = self._outputs(tokens, "hidden", len(tokens) - 1 if pooling == "last" else 0)
        return pooled(states, normalize=normalize)

    def score(self, prompt: Sequence[int] | str, continuation: Sequence[int] | str) -> Score:
        """Return how likely the model finds a continuation of a prompt.

        Both are texts or token ids. Two texts are tokenized as one, so that their border does not change the tokens;
        where a token lies across the border, the continuation begins with it. An empty prompt stands for the BOS
        token. What the prompt has in common with an earlier one is not evaluated again.

        Raises:
            TritGgufError: an empty continuation, logits that are not finite, or as `logits`.

        """
        before, after = self._prompt_and_continuation(prompt, continuation)
        self.engine.model.check_tokens(np.asarray(after))  # the last one is not evaluated
        logits = self._outputs([*before, *after[:-1]], "logits", len(before) - 1)
        chosen = log_softmax(logits)[np.arange(len(after)), after]
        return Score(after, chosen.tolist(), bool((logits.argmax(axis=1) == after).all()))

    def _tokens(self, text: Sequence[int] | str) -> list[int]:
        if isinstance(text, str):
            return self.tokenizer.encode(text, add_special=True, parse_special=False)
        try:
            return [operator.index(token) for token in text]
        except TypeError as error:
            raise BadRequestError(f"a text or a list of token ids is needed, not {text!r:.60}") from error

    def _prompt_and_continuation(
        self, prompt: Sequence[int] | str, continuation: Sequence[int] | str
    ) -> tuple[list[int], list[int]]:
        if isinstance(prompt, str) and isinstance(continuation, str):
            whole = self._tokens(prompt + continuation)
            pairs = zip(self._tokens(prompt), whole, strict=False)
            border = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
            before, after = whole[:border], whole[border:]
        else:
            before = self._tokens(prompt)
            if isinstance(continuation, str):
                after = self.tokenizer.encode(continuation, add_special=False, parse_special=False)
            else:
                after = self._tokens(continuation)
        if not before and self.tokenizer.bos_id is not None:
            before = [self.tokenizer.bos_id]
        if not before:
            raise BadRequestError("the model has no BOS token, so a score needs a prompt")
        if not after:
            raise BadRequestError("the continuation has no tokens; give a longer one")
        return before, after

    def _outputs(self, tokens: list[int], wanted: Wanted, first: int) -> np.ndarray:
        return self.engine.outputs(self.engine.submit(Request(tokens, wanted=wanted, first_output=first)))


def pooled(states: np.ndarray, *, normalize: bool = True) -> np.ndarray:
    """Return the mean, float32 [hidden], of hidden states, float32 [tokens, hidden]; with the length 1 if wanted."""
    embedding = states.astype(np.float64).mean(axis=0)
    if normalize:
        embedding /= max(float(np.linalg.norm(embedding)), 1e-12)
    return embedding.astype(np.float32)


def load(
    path: str | Path,
    *,
    context: int | None = None,
    parallel: int = 16,
    threads: int | None = None,
    prefill_bits: int = 8,
    decode_bits: int = 16,
    exact: bool = False,
    cache_type: str | None = None,
    isa: str | None = None,
    lookup: bool = False,
    draft: str | Path | None = None,
    draft_max: int = 16,
    on_compilation: Callable[[], None] | None = None,
    on_download: OnDownload | None = None,
) -> LoadedModel:
    """Open a trit GGUF file for generation.

    Args:
        path: the file, or its name on the hub (`organization/name:d2`), which is fetched unless the cache has it.
        context: room for a prompt and its answer, in tokens; None for what the model was trained for.
        parallel: how many generations run at once; others wait.
        threads: None for the physical cores.
        prefill_bits: of the activations of prompts, 8 or 16.
        decode_bits: of the activations of generated tokens, 16 or 8: less accurate, and faster for many at once.
        exact: whether all activations are multiplied with 31 bits, at a fraction of the speed.
        cache_type: what keys and values are kept in: "f16", "f32" or "q8_0"; None for f16, or f32 if `exact`.
        isa: the instruction set, such as "avx2"; None for the best that works here.
        lookup: whether to guess next tokens from equal passages of prompt and answer; answers stay the same.
        draft: the trit file of a smaller model with the same vocabulary, which guesses instead; named like `path`.
        draft_max: how many tokens are guessed at most.
        on_compilation: called if kernels have to be compiled, which takes half a minute on a machine's first run.
        on_download: called while a file is fetched.

    Raises:
        TritGgufError: the file is damaged, of an unknown kind or not to be had, an option has an impossible value, or
            the context needs more memory than there is.

    """
    _check_options(path, context, parallel, lookup=lookup, draft=draft, draft_max=draft_max)
    start = time.perf_counter()
    from tritgguf.runtime.model import Model
    from tritgguf.tokenization.template_process import start_renderer

    file, other_seconds = _open(path, isa, on_download)
    start += other_seconds
    template = file.metadata.get("tokenizer.chat_template")
    template = template if isinstance(template, str) else None
    if template is not None:
        start_renderer()  # beside the rest of loading
    tokenizer = Tokenizer(file.metadata, name=str(path))
    model = Model(file, prefill_bits=prefill_bits, decode_bits=decode_bits, exact=exact, threads=threads, isa=isa)
    cache_type = _cache_type(model, file.path, context, cache_type)
    _check_cut(model, draft_max if lookup or draft is not None else 0)
    draft_model = None if draft is None else Model(_draft_file(draft, file, on_download), threads=threads, isa=isa)
    speculation = _make_speculation(model, draft_model, lookup=lookup, draft_max=draft_max, parallel=parallel)
    engine = _make_engine(model, context, parallel, cache_type, speculation)
    start += _compile(model, draft_model, cache_type, on_compilation, batches=parallel > 1 or speculation is not None)
    return LoadedModel(file.path, tokenizer, template, time.perf_counter() - start, engine)


def _open(path: str | Path, isa: str | None, on_download: OnDownload | None) -> tuple[GgufFile, float]:
    """Open the file, fetch it first and compile the kernels if necessary; return how long the last two took, too."""
    from tritgguf.formats.gguf_file import open_trit_file
    from tritgguf.runtime.compiler import prepare_kernels

    start = time.perf_counter()
    path = _local(path, on_download)
    seconds = time.perf_counter() - start
    file = open_trit_file(path)
    return file, seconds + prepare_kernels(isa)


def _draft_file(path: str | Path, file: GgufFile, on_download: OnDownload | None) -> GgufFile:
    from tritgguf.formats.gguf_file import GgufFile
    from tritgguf.generation.draft_model import check_vocabularies

    draft = GgufFile(_local(path, on_download))
    check_vocabularies(file, draft)
    return draft


def _local(path: str | Path, on_download: OnDownload | None) -> str | Path:
    """Return the path of a file that is named; it is fetched if that is a name on the hub and the cache lacks it."""
    from tritgguf.sources.hub_names import name_instead_of

    name = name_instead_of(path)
    if name is None:
        return path
    from tritgguf.sources.hub_files import local_or_fetched

    return local_or_fetched(name, on_download or (lambda stage, done, total: None)).location


def _make_speculation(
    model: Model, draft_model: Model | None, *, lookup: bool, draft_max: int, parallel: int
) -> Speculation | None:
    """Return what guesses tokens; None where nothing shall."""
    if not lookup and draft_model is None:
        return None
    from tritgguf.generation.speculation import Speculation

    if draft_model is None:
        from tritgguf.generation.lookup import Lookup

        return Speculation(Lookup(), draft_max)
    from tritgguf.generation.draft_model import drafting

    _check_cut(draft_model, draft_max)
    return Speculation(drafting(draft_model, model, parallel), draft_max)


def _check_options(
    path: str | Path, context: int | None, parallel: int, *, lookup: bool, draft: str | Path | None, draft_max: int
) -> None:
    """Raise BadRequestError for options that are impossible whatever the models are."""
    if (context is not None and context < 1) or parallel < 1:
        raise BadRequestError(f"{path}: context and parallel must be 1 or more, not {context} and {parallel}")
    if draft_max < 1:
        raise BadRequestError(f"--draft-max (draft_max) must be 1 or more, not {draft_max}")
    if lookup and draft is not None:
        raise BadRequestError("tokens are guessed by --lookup or by --model-draft (draft), not by both; leave one out")


def _check_cut(model: Model, draft_max: int) -> None:
    """Raise BadRequestError if a model cannot take back so many tokens."""
    from tritgguf.runtime.kv_pool import most_cut

    most = most_cut(model.config)
    if most == 0 and draft_max:
        raise BadRequestError(
            "a model with states (Gated DeltaNet) cannot take guessed tokens back; leave out --lookup and --model-draft"
            " (lookup, draft)"
        )
    if most is not None and draft_max > most:
        raise BadRequestError(
            f"--draft-max (draft_max) is {draft_max}, but a model with convolutions can take back {most} tokens"
        )


def _cache_type(model: Model, path: str | Path, context: int | None, wanted: str | None) -> str:
    """Return the type of the cache; TritGgufError for an unknown one, and if it needs more memory than there is."""
    from tritgguf.runtime.kv_pool import check_cache_fits, check_cache_type

    cache_type = wanted or model.default_cache_type
    check_cache_type(cache_type)
    if context is not None:
        check_cache_fits(model.config, context, cache_type, str(path))
    return cache_type


def _make_engine(
    model: Model, context: int | None, parallel: int, cache_type: str, speculation: Speculation | None
) -> Engine:
    from tritgguf.generation.engine import Engine
    from tritgguf.runtime.kv_pool import pages_for

    context = context or model.config.context_length
    pages = pages_for(model.config, context, parallel, cache_type)
    return Engine(
        model, context=context, parallel=parallel, pages=pages, cache_type=cache_type, speculation=speculation
    )


def _compile(
    model: Model,
    draft_model: Model | None,
    cache_type: str,
    on_compilation: Callable[[], None] | None,
    *,
    batches: bool,
) -> float:
    """Make the kernels ready; return the seconds that it took if some had to be compiled, else 0."""
    start, compiled = time.perf_counter(), list[bool]()

    def announce() -> None:
        if not compiled and on_compilation is not None:
            on_compilation()
        compiled.append(True)

    model.compile(announce, cache_type=cache_type, batches=batches)
    if draft_model is not None:
        draft_model.compile(announce)
    return time.perf_counter() - start if compiled else 0.0


def loaded(model: LoadedModel | str | Path) -> LoadedModel:
    """Return a loaded model as it is, or load a file; TritGgufError for anything else, or as `load`."""
    if isinstance(model, str | Path):
        return load(model)
    if not isinstance(model, LoadedModel):
        raise BadRequestError(f"a loaded model or the path of its file is needed, not {model!r:.60}")
    return model
