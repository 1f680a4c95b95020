"""Tensors in blocks of rows: no row is lost, and no weight is clipped."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from cpu_kernels.threads.thread_pool import ThreadPool
from tritgguf.errors import TritGgufError
from tritgguf.exporters import row_blocks
from tritgguf.exporters.row_blocks import RowBlocks, stored_bytes
from tritgguf.formats.gguf_file import GgufFile

THREAD_POOL = ThreadPool(1)
F16, BF16 = GGMLQuantizationType.F16, GGMLQuantizationType.BF16
Q8_0, Q4_0 = GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_0


@pytest.mark.parametrize("weights_at_once", [1, 1000, 1 << 22])
@pytest.mark.parametrize("multiple", [1, 32, 96])
def test_blocks(
    tiny_trit_file: Callable[..., GgufFile], monkeypatch: pytest.MonkeyPatch, weights_at_once: int, multiple: int
) -> None:
    monkeypatch.setattr(row_blocks, "_WEIGHTS_AT_ONCE", weights_at_once)
    file = tiny_trit_file("qwen2", 3)
    for name, info in file.tensors.items():
        blocks = list(RowBlocks(file, name, THREAD_POOL).decoded(multiple))
        assert all(len(block) % multiple == 0 for block in blocks[:-1])
        assert all(len(block) <= max(multiple, weights_at_once // block.shape[1] + multiple) for block in blocks)
        np.testing.assert_array_equal(np.concatenate(blocks).reshape(info.shape), file.read_float32(name))


@pytest.mark.parametrize("kind", [F16, BF16, Q8_0, Q4_0])
def test_bytes(tiny_trit_file: Callable[..., GgufFile], kind: GGMLQuantizationType) -> None:
    file, name = tiny_trit_file(), "blk.1.ffn_down.weight"
    written = sum(block.nbytes for block in RowBlocks(file, name, THREAD_POOL).stored_as(kind))
    assert written == stored_bytes(file.tensors[name].shape, kind)


@pytest.mark.parametrize(
    ("kind", "fits", "too_large"),
    [
        (F16, 65519.0, 65520.0),
        (BF16, 3.396e38, 3.3962e38),
        (Q8_0, 65519.0 * 127, 65520.0 * 127),
        (Q4_0, 65519.0 * 8, 65520.0 * 8),
    ],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_range(
    tiny_trit_file: Callable[..., GgufFile], kind: GGMLQuantizationType, fits: float, too_large: float, sign: int
) -> None:
    rows = RowBlocks(tiny_trit_file(), "blk.0.attn_q.weight", THREAD_POOL)
    block = np.zeros((2, 64), np.float32)
    for value, is_held in ((fits, True), (too_large, False), (np.inf, False), (np.nan, False)):
        block[1, 7] = sign * value
        if is_held:
            converted = rows.to_type(block, kind)
            halves = {F16: converted, BF16: converted.view(np.uint16)}.get(kind, converted[:, :2])
            assert np.isfinite(halves.view(np.float16) if kind != BF16 else 0).all()
            if kind == BF16:
                assert (halves.astype(np.uint32) << np.uint32(16)).view(np.float32)[1, 7] == sign * np.float32(
                    3.3895314e38
                )
            continue
        with pytest.raises(TritGgufError, match=rf"blk\.0\.attn_q\.weight has a weight of .*{kind.name} cannot hold"):
            rows.to_type(block, kind)
