"""The model `tritgguf` of lm-evaluation-harness: requests of all kinds run side by side in the engine."""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from tritgguf.errors import BadRequestError
from tritgguf.generation.loaded_model import LoadedModel, load
from tritgguf.generation.sampling import Sampler
from tritgguf.generation.text_stream import TextStream
from tritgguf.lm_eval.generation_options import GenerationOptions, generation_options
from tritgguf.lm_eval.likelihoods import Continuation, log_likelihoods
from tritgguf.version import __version__

_PARALLEL = 64
_ANSWER_TOKENS = 256  # as lm-eval's other models have it

_TokenPair = tuple[tuple[str, str] | None, list[int], list[int]]
"""A context and a continuation as texts, where there are texts, and as tokens."""

Progress = Callable[[str, int, int], None]
"""Called with the stage, the number of requests done and their total."""


class TritGgufLM(TemplateLM):
    """A trit file, as lm-eval sees a model.

    Its tokens are those of lm-eval's model `hf`: control tokens in a text count as such, and BOS comes first where the
    model uses one.
    """

    def __init__(
        self,
        pretrained: str | Path | LoadedModel,
        *,
        max_length: int | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        prefix_token_id: int | None = None,
        max_gen_toks: int = _ANSWER_TOKENS,
        prefill_bits: int = 16,
        exact: bool = False,
        cache_type: str | None = None,
        threads: int | None = None,
        isa: str | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Load a file.

        Args:
            pretrained: the file, or a loaded model, whose own settings then count.
            max_length: tokens that a request may have; None for what the model was trained for.
            batch_size: how many requests run at once; "auto" and None for 64.
            max_batch_size, device: what lm-eval passes to every model; not used, a trit file runs on the CPU.
            prefix_token_id: the token that stands for an empty context; None for BOS, or EOS where there is no BOS.
            max_gen_toks: the longest answer in tokens where a task does not say.
            prefill_bits, exact, cache_type, threads, isa: as `load` takes them.
            progress: called as requests are done; None shows a tqdm bar, as lm-eval's other models do.

        Raises:
            TritGgufError: as `load`.

        """
        super().__init__()
        if isinstance(pretrained, LoadedModel):
            self.model = pretrained
        else:
            parallel = _PARALLEL if batch_size is None or str(batch_size).startswith("auto") else int(batch_size)
            self.model = load(
                pretrained, context=max_length, parallel=parallel, prefill_bits=prefill_bits, exact=exact,
                cache_type=cache_type, threads=threads, isa=isa,
            )  # fmt: skip
        self.max_length = min(max_length or self.model.context, self.model.context)
        self.max_gen_toks = max_gen_toks
        self._prefix_token_id = prefix_token_id
        self._progress = progress

    # -- tokens

    @property
    def eot_token_id(self) -> int | None:
        """EOS; None where the file names none."""
        return self.model.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The token that stands for an empty context."""
        tokenizer = self.model.tokenizer
        for token in (self._prefix_token_id, tokenizer.bos_id, tokenizer.eos_id):
            if token is not None:
                return token
        raise BadRequestError(f"{self.model.path} has neither BOS nor EOS; name a token (prefix_token_id=)")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the tokens of a text; BOS comes first where the model uses one, unless it is not wanted."""
        return self.model.tokenizer.encode(string, add_special=add_special_tokens is not False, parse_special=True)

    @property
    def tokenizer_name(self) -> str:
        """A name for caches of requests."""
        return self.model.path.name

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the template of chats; BadRequestError for the name of one of several, or if there is none."""
        if not chat_template:
            return None
        if isinstance(chat_template, str):
            raise BadRequestError(f"{self.model.path} has one chat template, without a name; leave the name out")
        return self._template()

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a chat as a text, which ends with the beginning of an answer if that is wanted."""
        from tritgguf.tokenization.chat_template import render

        tokenizer = self.model.tokenizer
        text = render(
            self._template(), chat_history, bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token,
            add_generation_prompt=add_generation_prompt,
        )  # fmt: skip
        return text if add_generation_prompt else _without_end(text, chat_history)

    def _template(self) -> str:
        if self.model.chat_template is None:
            raise BadRequestError(f"{self.model.path} has no chat template; evaluate it without one")
        return self.model.chat_template

    # -- requests

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each continuation, and whether it is what greedy sampling would give."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm or self._progress is not None)
        return found

    def _loglikelihood_tokens(
        self, requests: Sequence[_TokenPair], disable_tqdm: bool = False, **options: Any
    ) -> list[tuple[float, bool]]:
        """Return log-likelihoods of pairs of tokens, each with whether it is what greedy sampling would give."""
        continuations = [self._fitting(context, tokens) for _, context, tokens in requests]
        self._warn_of_cuts(sum(len(c.context) < len(r[1]) for c, r in zip(continuations, requests, strict=True)))
        with self._shown("log-likelihoods", len(continuations), disable_tqdm) as show:
            found = log_likelihoods(self.model.engine, continuations, show)
        for (texts, _, _), likelihood in zip(requests, found, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, (likelihood.log_likelihood, likelihood.is_greedy))
        return [(value, is_greedy) for value, is_greedy in found]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of whole texts, in windows of `max_length` tokens behind the prefix token."""
        windows, counts = list[_TokenPair](), list[int]()
        for request in requests:
            (text,) = request.args
            cut = get_rolling_token_windows(
                token_list=self.tok_encode(text, add_special_tokens=False), prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length, context_len=1,
            )  # fmt: skip
            pairs = [(None, *make_disjoint_window(window)) for window in cut]
            windows += pairs
            counts.append(len(pairs))
        parts = iter(self._loglikelihood_tokens(windows, disable_tqdm))
        sums = [sum(next(parts)[0] for _ in range(count)) for count in counts]
        for request, value in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return an answer to each context, up to one of the texts that end it."""
        prompts = [self._prompt(*request.args) for request in requests]
        self._warn_of_cuts(sum(is_cut for _, _, is_cut in prompts))
        answers, running = list[str](), deque[TextStream]()
        waiting = iter(prompts)
        try:
            with self._shown("answers", len(prompts), disable_tqdm) as show:
                while len(answers) < len(prompts):
                    while len(running) < 2 * self.model.engine.parallel and (prompt := next(waiting, None)):
                        running.append(self._stream(prompt[0], prompt[1]))
                    answers.append(running[0].finish().text)
                    running.popleft()
                    self.cache_hook.add_partial("generate_until", requests[len(answers) - 1].args, answers[-1])
                    show(len(answers))
        finally:
            for stream in running:
                stream.close()
        return answers

    def get_model_info(self) -> dict[str, Any]:
        """Return what lm-eval writes into its results about the model."""
        return {"tritgguf_version": __version__, "file": self.model.path.name, "max_length": self.max_length}

    def _fitting(self, context: Sequence[int], tokens: Sequence[int]) -> Continuation:
        """Return a pair of which the context is cut at its beginning where both are too long."""
        if not tokens:
            raise BadRequestError("a continuation has no tokens of its own; the task's texts should end in between")
        if len(tokens) > self.max_length:
            raise BadRequestError(
                f"a continuation has {len(tokens)} tokens, the context holds {self.max_length}; choose a larger one"
                " (max_length=)"
            )
        return Continuation(context[-(self.max_length + 1 - len(tokens)) :], tokens)

    def _prompt(self, text: str, options: dict[str, Any]) -> tuple[list[int], GenerationOptions, bool]:
        """Return a prompt's tokens, as many as leave room for the answer, its options, and whether some are cut off."""
        chosen = generation_options(options, max_tokens=self.max_gen_toks)
        tokens = self.tok_encode(text) or [self.prefix_token_id]
        room = self.max_length - chosen.max_tokens
        if room < 1:
            raise BadRequestError(
                f"an answer may have {chosen.max_tokens} tokens, the context holds {self.max_length}; choose a larger"
                " one (max_length=), or shorter answers (max_gen_toks=)"
            )
        return tokens[-room:], chosen, len(tokens) > room

    def _stream(self, tokens: list[int], options: GenerationOptions) -> TextStream:
        sampler = Sampler(options.sampling)
        return TextStream(
            self.model, tokens, sampler, max_tokens=options.max_tokens, stop=options.stop, continues_prompt=True
        )

    def _warn_of_cuts(self, count: int) -> None:
        if count:
            logging.getLogger(__name__).warning(
                "%d contexts are longer than %d tokens; their beginnings are cut off", count, self.max_length
            )

    @contextlib.contextmanager
    def _shown(self, stage: str, total: int, disable_tqdm: bool) -> Iterator[Callable[[int], None]]:
        """Give a function that shows how many requests are done."""
        if self._progress is not None:
            report = self._progress
            yield lambda done: report(stage, done, total)
            return
        from tqdm import tqdm

        with tqdm(total=total, disable=disable_tqdm, desc=f"Running {stage}") as bar:
            yield lambda done: bar.update(done - bar.n) and None


def _without_end(text: str, chat_history: Sequence[dict[str, str]]) -> str:
    """Return a rendered chat up to the end of its last message, which is to be continued."""
    last = chat_history[-1]["content"].strip()
    place = text.rfind(last)
    if place < 0:
        raise BadRequestError("the chat template does not show the last message, so that nothing can continue it")
    return text[: place + len(last)]
