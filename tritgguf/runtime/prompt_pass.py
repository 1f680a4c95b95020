"""Tokens of prompts through every layer: matrix products of many vectors at once."""

from __future__ import annotations

import numpy as np

from cpu_kernels.threads.thread_pool import ThreadPool
from cpu_kernels.transformer.activations import add_and_normalize_batch, swiglu_batch
from cpu_kernels.transformer.attention import attend
from cpu_kernels.transformer.delta_net import mix_tokens, prepare_tokens
from cpu_kernels.transformer.kv_pages import KeyValues
from cpu_kernels.transformer.layer_options import ATTENTION, SHORT_CONVOLUTION
from cpu_kernels.transformer.projection import Batch
from cpu_kernels.transformer.rotation import rotate_and_store
from cpu_kernels.transformer.short_convolution import convolve_tokens
from tritgguf.runtime.config import ModelConfig
from tritgguf.runtime.expert_pass import ExpertPass
from tritgguf.runtime.weights import LayerWeights, ModelWeights


class _Workspace:
    """Every buffer of the forward pass for a batch of tokens."""

    def __init__(self, tokens: int, config: ModelConfig, bits: int) -> None:
        sizes, feed_forward = config.dimensions, config.feed_forward
        head_columns = sizes.heads * sizes.head_dim
        self.stream = np.zeros((tokens, sizes.hidden), np.float32)
        self.residual = np.zeros((tokens, sizes.hidden), np.float32)
        self.hidden = Batch(tokens, sizes.hidden, bits=bits)
        self.qkv = np.zeros((tokens, config.qkv_columns), np.float32)
        self.projected = np.zeros((tokens, config.projected_columns), np.float32)
        self.delta_gates = np.zeros((tokens, config.delta_gates), np.float32)
        self.attended = Batch(tokens, head_columns, bits=bits)
        self.gate_up = np.zeros((tokens, 2 * feed_forward), np.float32)
        self.gated = Batch(tokens, feed_forward, bits=bits)
        self.shared = np.zeros((tokens if config.has_shared_expert else 0, sizes.hidden), np.float32)  # its output

    def first(self, tokens: int) -> _Workspace:
        """Return the buffers of the first tokens, as views."""
        view = _Workspace.__new__(_Workspace)
        for name, buffer in vars(self).items():
            setattr(view, name, buffer.first(tokens) if isinstance(buffer, Batch) else buffer[:tokens])
        return view


class PromptPass:
    """Runs chunks of prompts; its buffers grow to the largest chunk it has seen."""

    def __init__(self, config: ModelConfig, weights: ModelWeights, *, bits: int, exact: bool) -> None:
        """Keep what every chunk needs; nothing is allocated before the first.

        `bits` of the activations: 8 or 16; `exact` needs 16 and multiplies what they leave out as well.
        """
        self._config, self._weights = config, weights
        self._bits, self._exact = bits, exact
        self._workspace = _Workspace(0, config, bits)
        sizes = config.dimensions.hidden, config.expert_feed_forward
        self._expert_pass = ExpertPass(weights.experts, *sizes, bits=bits, exact=exact)

    def run(self, thread_pool: ThreadPool, tokens: np.ndarray, segments: np.ndarray, kv: KeyValues) -> Batch:
        """Run tokens, int64 [n], which `segments` place in their sequences; see `TokenBatch.segments`.

        Returns the final norm's output, [n, hidden], quantized too; valid until the next call.
        """
        if len(self._workspace.stream) < len(tokens):
            self._workspace = _Workspace(len(tokens), self._config, self._bits)
        space = self._workspace.first(len(tokens))
        space.stream[:] = self._weights.embeddings[tokens]
        if self._config.embedding_scale != 1:
            space.stream *= self._config.embedding_scale
        space.residual[:] = 0.0
        sequences = np.repeat(segments[:, 2], segments[:, 1])
        positions = np.concatenate([np.arange(start, start + rows) for _, rows, _, start in segments.tolist()])
        output_norm = self._weights.layers[0].feed_forward_output_norm  # of nothing: no layer is before the first
        for index, layer in enumerate(self._weights.layers):
            self._advance(thread_pool, space, output_norm, layer.attention_norm)
            if self._config.layer_options.kinds[index] == ATTENTION:
                self._attend(thread_pool, space, layer, index, kv, segments, sequences, positions)
            else:
                self._mix(thread_pool, space, layer, index, kv, sequences, positions)
            layer.output.multiply(space.attended, space.residual, thread_pool, exact=self._exact)
            _add(layer.output_bias, space.residual)
            self._advance(thread_pool, space, layer.attention_output_norm, layer.feed_forward_norm)
            self._feed_forward(thread_pool, space, layer, index)
            output_norm = layer.feed_forward_output_norm
        self._advance(thread_pool, space, output_norm, self._weights.final_norm)
        return space.hidden

    def _advance(self, thread_pool: ThreadPool, space: _Workspace, output_norm: np.ndarray, norm: np.ndarray) -> None:
        """Add a layer's output to the residual stream, then normalize and quantize the stream."""
        options = self._config.layer_options
        thread_pool.run(
            add_and_normalize_batch, space.stream, space.residual, output_norm, options.residual_scale, norm,
            options.epsilon, *space.hidden.buffers,
        )  # fmt: skip

    def _attend(
        self,
        thread_pool: ThreadPool,
        space: _Workspace,
        layer: LayerWeights,
        index: int,
        kv: KeyValues,
        segments: np.ndarray,
        sequences: np.ndarray,
        positions: np.ndarray,
    ) -> None:
        heads, options = self._config.dimensions.heads, self._config.layer_options
        layer.qkv.multiply(space.hidden, space.qkv, thread_pool, exact=self._exact)
        bias, norm = layer.qkv_bias, layer.query_key_norm
        thread_pool.run(rotate_and_store, space.qkv, bias, norm, options, index, kv, heads, sequences, positions)
        thread_pool.run(attend, thread_pool.isa, space.qkv, options, index, kv, segments, heads, space.attended.x)
        space.attended.quantize(thread_pool)

    def _mix(
        self,
        thread_pool: ThreadPool,
        space: _Workspace,
        layer: LayerWeights,
        index: int,
        kv: KeyValues,
        sequences: np.ndarray,
        positions: np.ndarray,
    ) -> None:
        """Compute a layer without attention."""
        projected, gates, out, place = space.projected, space.delta_gates, space.attended.x, (sequences, positions)
        layer.qkv.multiply(space.hidden, projected, thread_pool, exact=self._exact)
        if self._config.layer_options.kinds[index] == SHORT_CONVOLUTION:
            thread_pool.run(convolve_tokens, layer.convolution, kv, index, projected, *place, out)
        else:
            delta, options, isa = self._weights.delta_net, self._config.layer_options, thread_pool.isa
            thread_pool.run(prepare_tokens, isa, delta, kv, index, space.hidden.x, projected, gates, *place)
            thread_pool.run(mix_tokens, isa, delta, options, kv, index, projected, gates, *place, out)
        space.attended.quantize(thread_pool)

    def _feed_forward(self, thread_pool: ThreadPool, space: _Workspace, layer: LayerWeights, index: int) -> None:
        """Compute a dense feed-forward, or experts and the shared expert if there is one."""
        if layer.gate_up.rows:
            self._dense(thread_pool, space, layer, space.residual if layer.experts is None else space.shared)
        if layer.experts is not None:
            self._expert_pass.run(
                thread_pool, index, layer.experts, space.hidden.x, self._config.layer_options.activation, space.shared,
                space.residual,
            )  # fmt: skip

    def _dense(self, thread_pool: ThreadPool, space: _Workspace, layer: LayerWeights, out: np.ndarray) -> None:
        layer.gate_up.multiply(space.hidden, space.gate_up, thread_pool, exact=self._exact)
        _add(layer.gate_bias, space.gate_up[:, : len(layer.gate_bias)])
        _add(layer.up_bias, space.gate_up[:, len(layer.gate_bias) :])
        keep = self._exact or layer.down.reads_floats
        thread_pool.run(swiglu_batch, space.gate_up, self._config.layer_options.activation, keep, *space.gated.buffers)
        layer.down.multiply(space.gated, out, thread_pool, exact=self._exact)
        _add(layer.down_bias, out)


def _add(bias: np.ndarray, out: np.ndarray) -> None:
    """Add a bias, if there is one, to every row."""
    if bias.any():
        out += bias
