"""Generated tokens through every layer: one, or several of any sequences, in one compiled function each."""

from __future__ import annotations

import numpy as np

from cpu_kernels.threads.thread_pool import ThreadPool
from cpu_kernels.transformer.attend_token import make_scratch
from cpu_kernels.transformer.decode import OutputHead, Weights, decode
from cpu_kernels.transformer.decode_batch import decode_batch
from cpu_kernels.transformer.kv_pages import KeyValues
from tritgguf.runtime.config import ModelConfig
from tritgguf.runtime.decode_buffers import batch_buffers, first_tokens, single_buffers
from tritgguf.runtime.weights import ModelWeights


class DecodePass:
    """Runs generated tokens; buffers for a single one are allocated here, those for several when they are needed."""

    def __init__(self, config: ModelConfig, weights: ModelWeights, threads: int, *, bits: int = 16) -> None:
        """Gather addresses and buffers for this many threads; `bits` are those of `run`'s activations, 16 or 8."""
        self._config, self._threads, self._bits = config, threads, bits
        self._embeddings, self._final_norm = weights.embeddings, weights.final_norm.copy()
        self._weights = _gathered(weights)
        head, sizes = weights.head, config.dimensions
        self._head = OutputHead(self._final_norm, head.addresses, head.matrix_rows, head.depths, head.steps)
        self._buffers = single_buffers(config, weights.experts, threads)
        self._scratch = make_scratch(1, sizes.heads, sizes.kv_heads, sizes.head_dim, threads)
        self._batch_buffers = batch_buffers(config, weights.experts, 0, threads, bits)
        self._batch_scratch = make_scratch(0, sizes.heads, sizes.kv_heads, sizes.head_dim, threads)
        self._counter = np.zeros(1, np.int64)

    def run_one(
        self, thread_pool: ThreadPool, token: int, sequence: int, position: int, kv: KeyValues, logits: np.ndarray
    ) -> None:
        """Run one token with 16-bit activations and write its logits, float32 [vocabulary]."""
        self._buffers.own_stream[:] = self._embeddings[token]
        if self._config.embedding_scale != 1:
            self._buffers.own_stream[:] *= self._config.embedding_scale
        self._buffers.residual[:] = 0.0
        thread_pool.run(
            decode, thread_pool.isa, self._weights, self._head, kv, self._scratch, self._buffers,
            self._config.layer_options, sequence, position, logits, self._counter,
        )  # fmt: skip

    def run(
        self, thread_pool: ThreadPool, tokens: np.ndarray, sequences: np.ndarray, positions: np.ndarray, kv: KeyValues
    ) -> np.ndarray:
        """Run tokens, int64 [n], where they stand, int64 [n] each.

        Returns the final norm's output, float32 [n, hidden], valid until the next call.
        """
        count, sizes = len(tokens), self._config.dimensions
        if len(self._batch_buffers.stream) < count:
            room = 1 << (count - 1).bit_length()
            self._batch_buffers = batch_buffers(self._config, self._weights.experts, room, self._threads, self._bits)
            self._batch_scratch = make_scratch(room, sizes.heads, sizes.kv_heads, sizes.head_dim, self._threads)
        buffers = first_tokens(self._batch_buffers, count)
        buffers.stream[:] = self._embeddings[tokens]
        if self._config.embedding_scale != 1:
            buffers.stream[:] *= self._config.embedding_scale
        buffers.residual[:] = 0.0
        thread_pool.run(
            decode_batch, thread_pool.isa, self._weights, self._final_norm, kv, self._batch_scratch, buffers,
            self._config.layer_options, sequences, positions, self._counter,
        )  # fmt: skip
        return buffers.hidden[0]


def _gathered(weights: ModelWeights) -> Weights:
    """Return all layers' weights as the kernels take them."""
    layers = weights.layers
    return Weights(
        addresses=np.stack([np.concatenate([p.addresses for p in layer.projections]) for layer in layers]),
        rows=np.stack([np.concatenate([p.matrix_rows for p in layer.projections]) for layer in layers]),
        depths=np.stack([np.concatenate([p.depths for p in layer.projections]) for layer in layers]),
        steps=np.stack([np.concatenate([p.steps for p in layer.projections]) for layer in layers]),
        attention_norms=np.stack([layer.attention_norm for layer in layers]),
        query_key_norms=np.stack([layer.query_key_norm for layer in layers]),
        attention_output_norms=np.stack([layer.attention_output_norm for layer in layers]),
        feed_forward_norms=np.stack([layer.feed_forward_norm for layer in layers]),
        feed_forward_output_norms=np.stack([layer.feed_forward_output_norm for layer in layers]),
        qkv_biases=np.stack([layer.qkv_bias for layer in layers]),
        output_biases=np.stack([layer.output_bias for layer in layers]),
        gate_biases=np.stack([layer.gate_bias for layer in layers]),
        up_biases=np.stack([layer.up_bias for layer in layers]),
        down_biases=np.stack([layer.down_bias for layer in layers]),
        convolutions=np.stack([layer.convolution for layer in layers]),
        delta=weights.delta_net,
        experts=weights.experts,
    )
