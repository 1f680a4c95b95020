"""The activations' buffers of generated tokens."""

from __future__ import annotations

import numpy as np

from cpu_kernels.transformer.activations import VectorBuffers
from cpu_kernels.transformer.decode import Buffers
from cpu_kernels.transformer.decode_batch import BatchBuffers
from cpu_kernels.transformer.experts import ExpertBuffers, Experts
from cpu_kernels.transformer.experts_batch import ExpertBatchBuffers
from cpu_kernels.transformer.gemv_batch import scratch_for
from cpu_kernels.transformer.projection import Activations
from tritgguf.runtime.config import ModelConfig


def single_buffers(config: ModelConfig, experts: Experts, threads: int) -> Buffers:
    """Return the buffers of one token."""
    sizes, feed_forward = config.dimensions, config.feed_forward
    head_columns = sizes.heads * sizes.head_dim
    return Buffers(
        own_stream=np.zeros((threads, sizes.hidden), np.float32),
        own_hidden=Activations(threads, sizes.hidden).buffers,
        own_attended=Activations(threads, head_columns).buffers,
        qkv=np.zeros(config.qkv_columns, np.float32),
        projected=np.zeros(config.projected_columns, np.float32),
        delta_gates=np.zeros(config.delta_gates, np.float32),
        own_places=np.zeros((threads, 2), np.int64),
        residual=np.zeros(sizes.hidden, np.float32),
        gate=np.zeros(feed_forward, np.float32),
        up=np.zeros(feed_forward, np.float32),
        gated=Activations(1, feed_forward).buffers,
        experts=_single_expert_buffers(config, experts, threads),
    )


def _single_expert_buffers(config: ModelConfig, experts: Experts, threads: int) -> ExpertBuffers:
    chosen, feed_forward = config.routing.chosen, config.expert_feed_forward
    return ExpertBuffers(
        scores=np.zeros((1, experts.routers.shape[1]), np.float32),
        own_scores=np.zeros((threads, 2, experts.steps.shape[2]), np.float32),
        own_chosen=np.zeros((threads, chosen), np.int64),
        own_weights=np.zeros((threads, chosen), np.float32),
        gate=np.zeros((chosen, feed_forward), np.float32),
        up=np.zeros((chosen, feed_forward), np.float32),
        gated=Activations(chosen, feed_forward).buffers,
        own_out=np.zeros((threads, config.dimensions.hidden), np.float32),
    )


def batch_buffers(config: ModelConfig, experts: Experts, tokens: int, threads: int, bits: int) -> BatchBuffers:
    """Return the buffers of several tokens; `bits` are those of the activations."""
    sizes, feed_forward = config.dimensions, config.feed_forward
    head_columns = sizes.heads * sizes.head_dim
    return BatchBuffers(
        stream=np.zeros((tokens, sizes.hidden), np.float32),
        residual=np.zeros((tokens, sizes.hidden), np.float32),
        hidden=Activations(tokens, sizes.hidden, bits=bits).buffers,
        attended=Activations(tokens, head_columns, bits=bits).buffers,
        qkv=np.zeros((tokens, config.qkv_columns), np.float32),
        projected=np.zeros((tokens, config.projected_columns), np.float32),
        delta_gates=np.zeros((tokens, config.delta_gates), np.float32),
        gate=np.zeros((tokens, feed_forward), np.float32),
        up=np.zeros((tokens, feed_forward), np.float32),
        gated=Activations(tokens, feed_forward, bits=bits).buffers,
        own_rows=scratch_for(threads, max(sizes.hidden, head_columns, feed_forward, config.expert_feed_forward)),
        shared=np.zeros((tokens, sizes.hidden if config.has_shared_expert else 0), np.float32),
        experts=_batch_expert_buffers(config, experts, tokens, threads, bits),
    )


def _batch_expert_buffers(
    config: ModelConfig, experts: Experts, tokens: int, threads: int, bits: int
) -> ExpertBatchBuffers:
    chosen, hidden, feed_forward = config.routing.chosen, config.dimensions.hidden, config.expert_feed_forward
    count, entries = experts.steps.shape[2], tokens * chosen
    return ExpertBatchBuffers(
        scores=np.zeros((tokens, experts.routers.shape[1]), np.float32),
        own_scores=np.zeros((threads, 2, count), np.float32),
        chosen=np.zeros((tokens, chosen), np.int64),
        weights=np.zeros((tokens, chosen), np.float32),
        own_starts=np.zeros((threads, count + 1), np.int64),
        own_places=np.zeros((threads, entries), np.int64),
        hidden=Activations(entries, hidden, bits=bits).buffers,
        gate=np.zeros((entries, feed_forward), np.float32),
        up=np.zeros((entries, feed_forward), np.float32),
        gated=Activations(entries, feed_forward, bits=bits).buffers,
        out=np.zeros((entries, hidden), np.float32),
    )


def first_tokens(buffers: BatchBuffers, tokens: int) -> BatchBuffers:
    """Return the buffers of the first tokens, as views."""
    entries = tokens * buffers.experts.chosen.shape[1]
    return buffers._replace(
        stream=buffers.stream[:tokens],
        residual=buffers.residual[:tokens],
        hidden=_first(buffers.hidden, tokens),
        attended=_first(buffers.attended, tokens),
        qkv=buffers.qkv[:tokens],
        projected=buffers.projected[:tokens],
        delta_gates=buffers.delta_gates[:tokens],
        gate=buffers.gate[:tokens],
        up=buffers.up[:tokens],
        gated=_first(buffers.gated, tokens),
        shared=buffers.shared[:tokens],
        experts=buffers.experts._replace(
            scores=buffers.experts.scores[:tokens],
            chosen=buffers.experts.chosen[:tokens],
            weights=buffers.experts.weights[:tokens],
            hidden=_first(buffers.experts.hidden, entries),
            gate=buffers.experts.gate[:entries],
            up=buffers.experts.up[:entries],
            gated=_first(buffers.experts.gated, entries),
            out=buffers.experts.out[:entries],
        ),
    )


def _first(vectors: VectorBuffers, count: int) -> VectorBuffers:
    x, integers, offsets, scales = vectors
    return x[:count], integers[:count], offsets[:count], scales[:count]
