"""One token at a time through every layer, on a crew of threads: the forward pass of generation."""

from __future__ import annotations

import numpy as np

from cpu_kernels.simd import instruction_set
from cpu_kernels.threads.crew import Crew
from cpu_kernels.transformer.attention import Cache
from cpu_kernels.transformer.decode import Buffers, Head, Weights, decode
from cpu_kernels.transformer.projection import Activations
from tritgguf.runtime.config import ModelConfig
from tritgguf.runtime.weights import ModelWeights


class Decoder:
    """Runs single tokens; everything is prepared and allocated once, here."""

    def __init__(self, config: ModelConfig, weights: ModelWeights, crew: Crew) -> None:
        """Gather addresses and buffers for the threads of `crew`."""
        threads = crew.threads
        sizes = config.dimensions
        head_columns = sizes.heads * sizes.head_dim
        layers = weights.layers
        self._embeddings = weights.embeddings
        self._isa = instruction_set.chosen()
        self._weights = Weights(
            addresses=np.stack([np.concatenate([p.addresses for p in layer.projections]) for layer in layers]),
            rows=np.concatenate([p.matrix_rows for p in layers[0].projections]),
            kinds=np.stack([np.concatenate([p.kinds for p in layer.projections]) for layer in layers]),
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
        )
        head = weights.head
        self._head = Head(weights.final_norm.copy(), head.addresses, head.matrix_rows, head.kinds, head.steps)
        self._buffers = Buffers(
            own_stream=np.zeros((threads, sizes.hidden), np.float32),
            own_hidden=Activations(threads, sizes.hidden).buffers,
            own_attended=Activations(threads, head_columns).buffers,
            qkv=np.zeros(head_columns + 2 * sizes.kv_heads * sizes.head_dim, np.float32),
            residual=np.zeros(sizes.hidden, np.float32),
            gate=np.zeros(sizes.feed_forward, np.float32),
            up=np.zeros(sizes.feed_forward, np.float32),
            gated=Activations(1, sizes.feed_forward).buffers,
        )
        self._rules = config.rules
        self._embedding_scale = config.embedding_scale
        self._logits = np.zeros(sizes.vocabulary, np.float32)
        self._counter = np.zeros(1, np.int64)
        self.crew = crew

    def run(self, token: int, position: int, cache: Cache) -> np.ndarray:
        """Run one token at `position`; return its logits, float32 [vocabulary], valid until the next call."""
        self._buffers.own_stream[:] = self._embeddings[token]
        if self._embedding_scale != 1:
            self._buffers.own_stream[:] *= self._embedding_scale
        self._buffers.residual[:] = 0.0
        self.crew.run(
            decode, self._isa, self._weights, self._head, cache, self._buffers, self._rules, position, self._logits,
            self._counter,
        )  # fmt: skip
        return self._logits
