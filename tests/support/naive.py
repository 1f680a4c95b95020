"""Reference implementations for tests: the format, the encoder, the products and the model; simple and slow.

The format follows `docs/format.md`, digit by digit. All other arithmetic is float64, unless the format specifies
float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# -- the packed row

LEVEL, SCALE, ZERO = "level", "scale", "zero"
Digit = tuple[int, str, int, int]  # radix, field, index in the row, divisor; the digit is value // divisor % radix


def row_layout(depth: int, groups: int) -> list[list[Digit]]:
    """Return the digits of every word of a row, as section 3 of the format lists them."""
    levels = 3**depth

    def u(group: int, place: int, radix: int = levels, divisor: int = 1) -> Digit:
        return radix, LEVEL, 16 * group + place, divisor

    def i(group: int, radix: int = 27, divisor: int = 1) -> Digit:
        return radix, SCALE, group, divisor

    words: list[list[Digit]] = []
    if depth == 1:
        for g in range(groups):
            words.append([*(u(g, p) for p in range(8)), i(g, 9, 3)])
            words.append([*(u(g, p) for p in range(8, 16)), i(g, 3), (3, ZERO, 0, 1)])
    elif depth == 2:
        for g in range(groups):
            words.append([u(g, p) for p in range(5)])
            words.append([u(g, p) for p in range(8, 13)])
        words += [[u(g, p) for p in (5, 13, 6, 14, 7)] for g in range(groups)]
        words += [[u(g, 15), u(g + 1, 15), i(g), i(g + 1)] for g in range(0, groups, 2)]
    elif depth == 3:
        for g in range(groups):
            words.append([*(u(g, p) for p in (0, 1, 2)), u(g, 15, 3, 9)])
            words.append([*(u(g, p) for p in (8, 9, 10)), u(g, 15, 3, 3)])
        for g in range(groups):
            words.append([*(u(g, p) for p in (3, 4, 5)), u(g, 15, 3)])
            words.append([*(u(g, p) for p in (11, 12, 13)), i(g, 3, 9)])
        words += [[*(u(g, p) for p in (6, 14, 7)), i(g, 3, 3)] for g in range(groups)]
        words += [[*(i(t + k, 3) for k in range(4)), (729, ZERO, 0, 1)] for t in range(0, groups, 4)]
    else:
        for first, split in ((0, 6), (2, 14), (4, 7)):
            for g in range(groups):
                words.append([u(g, first), u(g, first + 1), u(g, split, 9, 9)])
                words.append([u(g, first + 8), u(g, first + 9), u(g, split, 9)])
        words += [[u(g, 15), u(g + 1, 15), i(g, 3, 9), i(g + 1, 3, 9)] for g in range(0, groups, 2)]
        words += [[*(i(t + k, 9) for k in range(4)), (9, ZERO, 0, 1)] for t in range(0, groups, 4)]
    return words


def pack_row(levels: Sequence[int], indices: Sequence[int], depth: int) -> bytes:
    """Pack one row of levels + h and scale indices to bytes."""
    values = {LEVEL: [int(u) for u in levels], SCALE: [int(i) for i in indices], ZERO: [0]}
    row = b""
    for word in row_layout(depth, len(indices)):
        code = 0
        for radix, field, index, divisor in word:
            code = code * radix + values[field][index] // divisor % radix
        row += (-(-code * 65536 // 59049)).to_bytes(2, "little")
    return row


def unpack_row(row: bytes, depth: int, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Unpack one row to levels + h [16 * groups] and scale indices [groups]."""
    values = {LEVEL: [0] * (16 * groups), SCALE: [0] * groups, ZERO: [0]}
    for number, word in enumerate(row_layout(depth, groups)):
        fraction = int.from_bytes(row[2 * number : 2 * number + 2], "little")
        for radix, field, index, divisor in word:
            values[field][index] += ((fraction * radix) >> 16) * divisor
            fraction = fraction * radix & 0xFFFF
    return np.array(values[LEVEL]), np.array(values[SCALE])


def largest_level(depth: int) -> int:
    """Return h."""
    return (3**depth - 1) // 2


def decode(levels: np.ndarray, indices: np.ndarray, codebook: np.ndarray, depth: int) -> np.ndarray:
    """Return the weights of levels + h [rows, columns] in the format's float32 arithmetic."""
    steps = np.asarray(codebook, np.float32) / np.float32(largest_level(depth))
    level = (np.asarray(levels, np.int64) - largest_level(depth)).astype(np.float32)
    return np.repeat(steps[indices], 16, axis=-1) * level


# -- the products


def quantize_activations(x: np.ndarray, bits: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """Quantize float32 vectors: return the integers [..., columns] and the step sizes [..., columns / 16]."""
    most = 2 ** (bits - 1) - 1
    groups = x.astype(np.float64).reshape(*x.shape[:-1], -1, 16)
    largest = np.abs(groups).max(axis=-1)
    largest[largest <= 1e-30] = 0
    steps = np.divide(most, largest, out=np.zeros_like(largest), where=largest > 0)
    return np.rint(groups * steps[..., None]).reshape(x.shape), largest / most


def exact_steps(levels: np.ndarray, indices: np.ndarray, codebook: np.ndarray, depth: int) -> np.ndarray:
    """Return the weights of levels + h in float64, with the format's float32 steps."""
    steps = (np.asarray(codebook, np.float32) / np.float32(largest_level(depth))).astype(np.float64)
    return np.repeat(steps[indices], 16, axis=-1) * (np.asarray(levels, np.int64) - largest_level(depth))


def trit_product(weights: np.ndarray, integers: np.ndarray, step_sizes: np.ndarray) -> np.ndarray:
    """Multiply weights [rows, columns] with quantized vectors in float64.

    integers: [tokens, columns]; step_sizes: [tokens, columns / 16].
    """
    return (integers * np.repeat(step_sizes.astype(np.float64), 16, axis=1)) @ weights.T


# -- the encoder v2


def wanted_scales(weights: np.ndarray, depth: int) -> tuple[np.ndarray, np.ndarray]:
    """Return each group's scale (float32 [rows, columns / 16]) and the margin of its choice.

    The candidates are the sorted magnitudes 10, 12, 14 and 15; the first with the least squared error is chosen. The
    margin is the relative difference to the error of the best candidate with another value.
    """
    h = largest_level(depth)
    groups = weights.reshape(len(weights), -1, 16).astype(np.float64)
    scales = np.zeros(groups.shape[:2], np.float32)
    margins = np.full(groups.shape[:2], np.inf)
    for index in np.ndindex(*scales.shape):
        group = groups[index]
        errors: dict[float, float] = {}
        for candidate in np.sort(np.abs(group))[[10, 12, 14, 15]]:
            if candidate > 0:
                level = np.clip(np.rint(group * h / candidate), -h, h)
                errors.setdefault(candidate, np.sum((group - level * candidate / h) ** 2))
        if errors:
            best = min(errors, key=lambda scale: errors[scale])
            scales[index] = best
            others = [error for scale, error in errors.items() if scale != best]
            if others:
                margins[index] = (min(others) - errors[best]) / min(others)
    return scales, margins


def log_spaced_codebook(scales: np.ndarray, largest: float, quantile: float) -> np.ndarray:
    """Return 27 scales with a constant ratio, from a quantile of the wanted scales to the largest magnitude."""
    wanted = sorted(float(scale) for scale in scales.flat if scale > 0)
    if not wanted:
        return np.zeros(27)
    lowest = wanted[int(quantile * (len(wanted) - 1))]
    return np.array([lowest * (largest / lowest) ** (entry / 26) for entry in range(27)])


# -- the transformer


def root_mean_square_norm(x: np.ndarray, weight: np.ndarray, epsilon: float) -> np.ndarray:
    """Return the RMS norm of vectors [..., columns]."""
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + epsilon) * weight


def layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, epsilon: float) -> np.ndarray:
    """Return the LayerNorm of vectors [..., columns]."""
    centred = x - x.mean(axis=-1, keepdims=True)
    return root_mean_square_norm(centred, weight, epsilon) + bias


def softmax(x: np.ndarray) -> np.ndarray:
    """Return the softmax of scores."""
    powers = np.exp(x - x.max())
    return powers / powers.sum()


def rotate(head: np.ndarray, angles: np.ndarray, interleaved: bool) -> np.ndarray:
    """Rotate each pair of a head's elements, as a complex number, by its angle."""
    half = len(head) // 2
    pairs = [(2 * i, 2 * i + 1) if interleaved else (i, i + half) for i in range(half)]
    rotated = np.empty_like(head)
    for (a, b), angle in zip(pairs, angles, strict=True):
        number = complex(head[a], head[b]) * complex(np.cos(angle), np.sin(angle))
        rotated[a], rotated[b] = number.real, number.imag
    return rotated


def transformer_logits(
    metadata: Mapping[str, Any], tensors: Mapping[str, np.ndarray], tokens: Sequence[int]
) -> np.ndarray:
    """Return the logits [tokens, vocabulary] of a `llama` or `qwen2` model from its GGUF metadata and tensors."""
    arch = metadata["general.architecture"]
    heads, kv_heads = metadata[f"{arch}.attention.head_count"], metadata[f"{arch}.attention.head_count_kv"]
    epsilon = metadata[f"{arch}.attention.layer_norm_rms_epsilon"]
    weights = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    dim = weights["blk.0.attn_q.weight"].shape[0] // heads

    angles_per_token = metadata[f"{arch}.rope.freq_base"] ** (-2 * np.arange(dim // 2) / dim)
    if metadata.get(f"{arch}.rope.scaling.type") == "linear":
        angles_per_token /= metadata[f"{arch}.rope.scaling.factor"]
    if "rope_freqs.weight" in weights:
        angles_per_token /= weights["rope_freqs.weight"]

    def project(layer: int, name: str, x: np.ndarray) -> np.ndarray:
        return x @ weights[f"blk.{layer}.{name}.weight"].T + weights.get(f"blk.{layer}.{name}.bias", 0.0)

    def rotated_heads(x: np.ndarray) -> np.ndarray:
        split = x.reshape(len(x), -1, dim)
        return np.array(
            [
                [rotate(head, position * angles_per_token, arch == "llama") for head in token]
                for position, token in enumerate(split)
            ]
        )

    x = weights["token_embd.weight"][list(tokens)]
    for layer in range(metadata[f"{arch}.block_count"]):
        normed = root_mean_square_norm(x, weights[f"blk.{layer}.attn_norm.weight"], epsilon)
        q, k = (rotated_heads(project(layer, name, normed)) for name in ("attn_q", "attn_k"))
        v = project(layer, "attn_v", normed).reshape(len(x), kv_heads, dim)
        attended = np.empty_like(q)
        for t in range(len(x)):
            for head in range(heads):
                shared = head // (heads // kv_heads)
                probabilities = softmax(k[: t + 1, shared] @ q[t, head] / np.sqrt(dim))
                attended[t, head] = probabilities @ v[: t + 1, shared]
        x = x + project(layer, "attn_output", attended.reshape(len(x), -1))
        normed = root_mean_square_norm(x, weights[f"blk.{layer}.ffn_norm.weight"], epsilon)
        gate = project(layer, "ffn_gate", normed)
        x = x + project(layer, "ffn_down", gate / (1 + np.exp(-gate)) * project(layer, "ffn_up", normed))
    x = root_mean_square_norm(x, weights["output_norm.weight"], epsilon)
    return x @ weights.get("output.weight", weights["token_embd.weight"]).T
