"""Many tokens at once through every layer: the forward pass of a prompt."""

from __future__ import annotations

import numpy as np

from cpu_kernels.simd import instruction_set
from cpu_kernels.threads.crew import Crew
from cpu_kernels.transformer.activations import advance_batch, gate_batch
from cpu_kernels.transformer.attend_texts import attend_texts
from cpu_kernels.transformer.attention import Cache, attend, rotate_and_store
from cpu_kernels.transformer.projection import Batch
from tritgguf.architectures.dimensions import Dimensions
from tritgguf.runtime.config import ModelConfig
from tritgguf.runtime.weights import ModelWeights

_CACHE_AXES = 5  # of one text's keys


class _Workspace:
    """Every buffer of the forward pass for a batch of tokens."""

    def __init__(self, tokens: int, sizes: Dimensions, bits: int) -> None:
        head_columns = sizes.heads * sizes.head_dim
        self.stream = np.zeros((tokens, sizes.hidden), np.float32)
        self.residual = np.zeros((tokens, sizes.hidden), np.float32)
        self.hidden = Batch(tokens, sizes.hidden, bits=bits)
        self.qkv = np.zeros((tokens, head_columns + 2 * sizes.kv_heads * sizes.head_dim), np.float32)
        self.attended = Batch(tokens, head_columns, bits=bits)
        self.gate_up = np.zeros((tokens, 2 * sizes.feed_forward), np.float32)
        self.gated = Batch(tokens, sizes.feed_forward, bits=bits)

    def first(self, tokens: int) -> _Workspace:
        """Return the buffers of the first tokens, as views."""
        view = _Workspace.__new__(_Workspace)
        for name, buffer in vars(self).items():
            setattr(view, name, buffer.first(tokens) if isinstance(buffer, Batch) else buffer[:tokens])
        return view


class Prefill:
    """Runs batches of tokens; its buffers grow to the largest batch it has seen."""

    def __init__(self, config: ModelConfig, weights: ModelWeights, crew: Crew, *, bits: int, exact: bool) -> None:
        """Keep what every batch needs; nothing is allocated before the first.

        `bits` of the activations: 8 or 16; `exact` needs 16 and multiplies what they leave out as well.
        """
        self._config = config
        self._weights = weights
        self.crew = crew
        self._bits, self._exact = bits, exact
        self._isa = instruction_set.chosen()
        self._workspace = _Workspace(0, config.dimensions, bits)

    def run(self, tokens: np.ndarray, position: int, cache: Cache) -> Batch:
        """Run tokens [n] whose first stands at `position` in the cache; return the final norm's output, [n, hidden].

        With `caches_of_texts`, each token belongs to a text of its own, and all stand at `position`.
        """
        if len(self._workspace.stream) < len(tokens):
            self._workspace = _Workspace(len(tokens), self._config.dimensions, self._bits)
        space = self._workspace.first(len(tokens))
        hidden, attended, gated = space.hidden, space.attended, space.gated
        exact = self._exact
        heads, rules, crew = self._config.dimensions.heads, self._config.rules, self.crew

        space.stream[:] = self._weights.embeddings[tokens]
        if self._config.embedding_scale != 1:
            space.stream *= self._config.embedding_scale
        space.residual[:] = 0.0
        output_norm = self._weights.layers[0].feed_forward_output_norm  # of nothing: no layer is before the first

        def advance(norm: np.ndarray) -> None:
            scale, epsilon = rules.residual_scale, rules.epsilon
            crew.run(advance_batch, space.stream, space.residual, output_norm, scale, norm, epsilon, *hidden.buffers)

        for index, layer in enumerate(self._weights.layers):
            advance(layer.attention_norm)
            layer.qkv.multiply(hidden, space.qkv, crew, exact=exact)
            bias, norm = layer.qkv_bias, layer.query_key_norm
            if cache.keys.ndim > _CACHE_AXES:
                arguments = (space.qkv, bias, norm, rules, index, cache, heads, position)
                crew.run(attend_texts, self._isa, *arguments, attended.x)
            else:
                crew.run(rotate_and_store, space.qkv, bias, norm, rules, index, cache, heads, position)
                crew.run(attend, self._isa, space.qkv, rules, index, cache, position, heads, attended.x)
            attended.quantize(crew)
            layer.output.multiply(attended, space.residual, crew, exact=exact)
            _add(layer.output_bias, space.residual)
            output_norm = layer.attention_output_norm
            advance(layer.feed_forward_norm)
            layer.gate_up.multiply(hidden, space.gate_up, crew, exact=exact)
            _add(layer.gate_bias, space.gate_up[:, : len(layer.gate_bias)])
            _add(layer.up_bias, space.gate_up[:, len(layer.gate_bias) :])
            keep = exact or layer.down.reads_floats
            crew.run(gate_batch, space.gate_up, rules.gelu, keep, *gated.buffers)
            layer.down.multiply(gated, space.residual, crew, exact=exact)
            _add(layer.down_bias, space.residual)
            output_norm = layer.feed_forward_output_norm
        advance(self._weights.final_norm)
        return hidden


def _add(bias: np.ndarray, out: np.ndarray) -> None:
    """Add a bias, if there is one, to every row."""
    if bias.any():
        out += bias
