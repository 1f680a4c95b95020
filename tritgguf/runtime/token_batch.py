"""The tokens of one forward pass: chunks of prompts and generated tokens of any number of sequences."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class TokenBatch:
    """Tokens, where each stands, and which of them have logits.

    Tokens of prompts come first. Those of one sequence follow one another, at increasing positions. They are computed
    with the activations that prompts have (8 bits by default), generated tokens with 16 bits; so what a token gives
    does not depend on the other tokens, nor on how a prompt is cut into chunks.

    Attributes:
        tokens: int64 [n].
        positions: int64 [n], in their sequences, from 0.
        sequences: int64 [n], numbers that `KVPool.allocate` gave.
        prompt_tokens: how many of them belong to prompts.
        outputs: int64 [m], increasing: the tokens whose logits are wanted.

    """

    tokens: np.ndarray
    positions: np.ndarray
    sequences: np.ndarray
    prompt_tokens: int
    outputs: np.ndarray

    @classmethod
    def of_chunks(cls, chunks: list[tuple[int, int, list[int], int]], prompt_chunks: int) -> TokenBatch:
        """Return the batch of some chunks, those of prompts first.

        A chunk is its sequence, the position of its first token, its tokens, and how many of the last ones have logits.
        """
        tokens, positions, sequences, outputs = list[int](), list[int](), list[int](), list[int]()
        for sequence, position, of_chunk, with_logits in chunks:
            outputs += range(len(tokens) + len(of_chunk) - with_logits, len(tokens) + len(of_chunk))
            tokens += of_chunk
            positions += range(position, position + len(of_chunk))
            sequences += [sequence] * len(of_chunk)
        return cls(
            np.array(tokens, np.int64),
            np.array(positions, np.int64),
            np.array(sequences, np.int64),
            sum(len(of_chunk) for _, _, of_chunk, _ in chunks[:prompt_chunks]),
            np.array(outputs, np.int64),
        )

    def segments(self, first: int, last: int) -> np.ndarray:
        """Return runs of neighbouring tokens in one sequence, from token `first` to before `last`.

        int64 [runs, 4]: row counted from `first`, number of rows, sequence, position of the first row.
        """
        positions, sequences = self.positions[first:last], self.sequences[first:last]
        breaks = np.flatnonzero((np.diff(sequences) != 0) | (np.diff(positions) != 1)) + 1
        starts = np.concatenate([[0], breaks]).astype(np.int64)
        rows = np.diff(np.concatenate([starts, [last - first]]))
        return np.stack([starts, rows, sequences[starts], positions[starts]], axis=1).astype(np.int64)
