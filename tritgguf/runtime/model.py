"""A model that runs straight from its file: weights, threads and rotation tables, shared by all sequences.

A forward pass takes any mix of prompts and generated tokens. Prompts go through products of many vectors at once, a
single generated token through one compiled function from the first layer to the last, and several through a function
like it that unpacks every weight once for all of them. What a token gives depends on its own sequence alone, to the
last bit: neither on the other tokens of the pass nor on how a prompt is cut into chunks.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import numpy as np

from cpu_kernels.threads.thread_pool import CompilingThreadPool, ThreadPool, announcing_compilation
from cpu_kernels.transformer.kv_pages import KeyValues
from cpu_kernels.transformer.projection import Activations
from tritgguf.errors import BadRequestError
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.runtime.compiler import prepare_kernels, require_compiler
from tritgguf.runtime.config import ModelConfig
from tritgguf.runtime.decode_pass import DecodePass
from tritgguf.runtime.kv_pool import DEFAULT_CACHE_TYPE, KVPool, pages_of
from tritgguf.runtime.prompt_pass import PromptPass
from tritgguf.runtime.rotations import RotationTables
from tritgguf.runtime.token_batch import TokenBatch
from tritgguf.runtime.weights import ModelWeights

BATCH_TOKENS = 512  # tokens of prompts that are computed at once
GENERATED_TOKENS = 64  # generated tokens that are computed at once


class Model:
    """A model's weights, ready to run. It holds no sequence; those are in a `KVPool`.

    Attributes:
        config: the model's sizes and options.
        thread_pool: the threads that run it.
        exact: whether all activations are multiplied with 31 bits.

    Raises TritGgufError for a file that is no trit model or is damaged.

    """

    def __init__(
        self,
        file: GgufFile,
        *,
        threads: int | None = None,
        prefill_bits: int = 8,
        decode_bits: int = 16,
        exact: bool = False,
        isa: str | None = None,
    ) -> None:
        """Map the weights of `file`.

        `threads` None takes the physical cores. `prefill_bits` are those of the activations of prompts, 8 or 16.
        `decode_bits` are those of generated tokens: 16, or 8, which is less accurate, and faster for several sequences
        at once. `exact` multiplies all activations with 31 bits, at a fraction of the speed. `isa` names the
        instruction set; None takes the best that works here. Other numbers of bits raise BadRequestError.
        """
        require_compiler()
        for name, bits in (("prefill_bits", prefill_bits), ("decode_bits", decode_bits)):
            if bits not in (8, 16):
                raise BadRequestError(f"{file.path}: {name} must be 8 or 16, not {bits}")
        self.thread_pool = ThreadPool(threads, isa=isa)
        try:
            _ = self.thread_pool.isa
        except ValueError as error:
            raise BadRequestError(str(error)) from error
        self.config = ModelConfig.from_file(file)
        self.exact, self._decode_bits = exact, decode_bits
        self._file = file  # keeps the map open
        self._weights = ModelWeights(file, self.config)
        self._short_rotations = RotationTables(self.config.rotations)
        self._long_rotations = self._short_rotations
        if self.config.long_rotations is not self.config.rotations:
            self._long_rotations = RotationTables(self.config.long_rotations)
        bits = 16 if exact else prefill_bits
        self._prompt_pass = PromptPass(self.config, self._weights, bits=bits, exact=exact)
        self._decode_pass = DecodePass(self.config, self._weights, self.thread_pool.threads, bits=decode_bits)
        self._outputs = Activations(0, self.config.dimensions.hidden)
        self._one_at_a_time = threading.Lock()  # the passes share their buffers
        prepare_kernels(isa)

    def new_kv_pool(
        self, *, context: int, sequences: int = 1, pages: int | None = None, cache_type: str | None = None
    ) -> KVPool:
        """Return a pool for `sequences` sequences of at most `context` tokens.

        `pages` None is enough for all of them at once, and for a copy of a shared page each. `cache_type` is what keys
        and values are kept in, "f16", "f32" or "q8_0"; None is `default_cache_type`.
        """
        if pages is None:
            pages = sequences * (pages_of(context) + 1)
        cache_type = cache_type or self.default_cache_type
        return KVPool(self.config, pages=pages, sequences=sequences, context=context, cache_type=cache_type)

    @property
    def default_cache_type(self) -> str:
        """What keys and values are kept in unless the caller chooses: float16, or float32 with `exact`."""
        return "f32" if self.exact else DEFAULT_CACHE_TYPE

    def compile(self, announce: Callable[[], None], *, cache_type: str | None = None, batches: bool = True) -> None:
        """Compile every kernel that the model needs, or load it from the cache.

        Otherwise the first tokens would have to wait for it. `announce` is called once if something is really
        compiled, which happens on a machine's first run and takes about half a minute. `cache_type` is that of the
        pools, as in `new_kv_pool`. Without `batches`, what only several outputs of a forward pass need is left out.
        """
        compiler = CompilingThreadPool(1, isa=self.thread_pool.isa_name)
        pool = self.new_kv_pool(context=1, cache_type=cache_type)
        token, logits = np.zeros(1, np.int64), np.zeros((2, self.config.vocab_size), np.float32)
        hidden = np.zeros((2, self.config.dimensions.hidden), np.float32)
        with announcing_compilation(announce):
            arrays = pool.key_values(self._rotations(pool))
            self._prompt_pass.run(compiler, token, np.array([[0, 1, 0, 0]]), arrays)
            if self._decode_bits == 16 and not self.exact:
                self._decode_pass.run_one(compiler, 0, 0, 0, arrays, logits[0])
            if (self._decode_bits == 8 or batches) and not self.exact:
                self._decode_pass.run(compiler, token, token, token, arrays)
            self._multiply_head(hidden[:1], logits[:1], compiler)
            if batches:
                self._multiply_head(hidden, logits, compiler)

    def forward(
        self, batch: TokenBatch, kv: KVPool, logits: np.ndarray | None, hidden: np.ndarray | None = None
    ) -> None:
        """Run a batch of tokens; their keys and values are stored in pages that `kv.reserve` has made room in.

        Args:
            batch: the tokens; `kv.advance` is the caller's task.
            kv: the pool of their sequences.
            logits: float32 [outputs, vocabulary], out; None where they are not wanted.
            hidden: float32 [outputs, hidden], out: the final norm's output; None where it is not wanted.

        Raises:
            TritGgufError: a token does not exist.
            ValueError: a position lies in no page of its own.

        """
        self.check_tokens(batch.tokens)
        if not kv.writable(batch.sequences, batch.positions):
            raise ValueError("the positions of a batch must be reserved first")
        with self._one_at_a_time:
            rotations = self._rotations(kv)
            rotations.reserve(int(batch.positions.max()) + 1)
            arrays = kv.key_values(rotations)
            if self._is_single(batch) and logits is not None and hidden is None:
                place = (int(batch.sequences[0]), int(batch.positions[0]))
                self._decode_pass.run_one(self.thread_pool, int(batch.tokens[0]), *place, arrays, logits[0])
            else:
                self._run(batch, arrays, logits, hidden)
            if logits is not None:
                if len(self._weights.head_bias):
                    logits += self._weights.head_bias
                apply_softcap(self.config, logits)

    @property
    def file_bytes(self) -> int:
        """Size of the model's file."""
        return self._file.path.stat().st_size

    def check_tokens(self, tokens: np.ndarray) -> None:
        """Raise TritGgufError when there are no tokens, int64 [n], or one that does not exist."""
        if tokens.size == 0 or tokens.min() < 0 or tokens.max() >= self.config.vocab_size:
            raise BadRequestError(f"{self._file.path}: tokens must be from 0 to {self.config.vocab_size - 1}")

    def _rotations(self, kv: KVPool) -> RotationTables:
        """Return the rotations of a pool's sequences: all have the same, so that pages can be shared."""
        return self._long_rotations if kv.context > self.config.original_context else self._short_rotations

    def _is_single(self, batch: TokenBatch) -> bool:
        """Tell whether a batch is one generated token with 16-bit activations."""
        one = len(batch.tokens) == len(batch.outputs) == 1
        return one and self._decode_bits == 16 and not self._computed_as_prompt(batch)

    def _computed_as_prompt(self, batch: TokenBatch) -> int:
        """Return how many tokens, from the first on, are computed with the activations of prompts."""
        return len(batch.tokens) if self.exact else batch.prompt_tokens

    def _run(self, batch: TokenBatch, arrays: KeyValues, logits: np.ndarray | None, hidden: np.ndarray | None) -> None:
        """Run prompts and generated tokens piece by piece; write logits and hidden states of the outputs."""
        done = 0
        for first, last, states in self._pieces(batch, arrays):
            wanted = batch.outputs[(batch.outputs >= first) & (batch.outputs < last)] - first
            if not len(wanted):
                continue
            rows = states[wanted]
            if hidden is not None:
                hidden[done : done + len(rows)] = rows
            if logits is not None:
                self._multiply_head(rows, logits[done : done + len(rows)], self.thread_pool)
            done += len(rows)

    def _pieces(self, batch: TokenBatch, arrays: KeyValues) -> Iterator[tuple[int, int, np.ndarray]]:
        """Yield first and last token of each piece, and its hidden states, float32 [tokens, hidden]."""
        count, prompts = len(batch.tokens), self._computed_as_prompt(batch)
        for first in range(0, prompts, BATCH_TOKENS):
            last = min(first + BATCH_TOKENS, prompts)
            states = self._prompt_pass.run(
                self.thread_pool, batch.tokens[first:last], batch.segments(first, last), arrays
            )
            yield first, last, states.x
        for first in range(prompts, count, GENERATED_TOKENS):
            last = min(first + GENERATED_TOKENS, count)
            place = (batch.sequences[first:last], batch.positions[first:last])
            yield first, last, self._decode_pass.run(self.thread_pool, batch.tokens[first:last], *place, arrays)

    def _multiply_head(self, rows: np.ndarray, logits: np.ndarray, thread_pool: ThreadPool) -> None:
        """Multiply hidden states, float32 [rows, hidden], with the output matrix."""
        head = self._weights.head
        if self.exact or len(rows) == 1:
            for row, out in zip(rows, logits, strict=True):
                head.multiply_vector(row, out, thread_pool, exact=self.exact)
            return
        if len(self._outputs.x) < len(rows):
            self._outputs = Activations(len(rows), rows.shape[1])
        outputs = self._outputs.first(len(rows))
        outputs.x[:] = rows
        outputs.quantize(thread_pool)
        head.multiply_vectors(outputs, logits, thread_pool)


def apply_softcap(config: ModelConfig, logits: np.ndarray) -> None:
    """Apply the logit scale and softcap in place."""
    cap = config.logit_softcap
    if config.logit_scale != 1:
        logits *= config.logit_scale
    if cap:
        np.tanh(logits / cap, out=logits)
        logits *= cap
