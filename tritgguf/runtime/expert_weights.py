"""The experts of a model's layers as views of the mapped file, and as the kernels take them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cpu_kernels.packed_rows.layout import TABLE_SIZE
from cpu_kernels.transformer.expert_stack import ExpertStack
from cpu_kernels.transformer.experts import Experts
from cpu_kernels.transformer.gemv import HALVES
from cpu_kernels.transformer.router import Routing
from tritgguf.errors import DamagedFileError
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.formats.gguf_header import F16, F32
from tritgguf.formats.trit_types import TritType, is_trit_type

_NO_BIASES = np.zeros((0, 0), np.float32)


class ExpertWeights:
    """One layer's experts: the router in float32, and a stack of matrices for each of gate, up and down."""

    def __init__(self, file: GgufFile, index: int) -> None:
        """Map the experts of layer `index`; TritGgufError for a tensor of a type that is not run."""
        self.router = read_float32(file, f"blk.{index}.ffn_gate_inp.weight")
        shared_gate = f"blk.{index}.ffn_gate_inp_shexp.weight"
        if shared_gate in file.tensors:
            self.router = np.concatenate([self.router, read_float32(file, shared_gate).reshape(1, -1)])
        self.router_bias = _read_optional(file, f"blk.{index}.ffn_gate_inp.bias")
        self.selection_bias = _read_optional(file, f"blk.{index}.exp_probs_b.bias")
        self.gate, self.up, self.down = (
            _read_stack(file, f"blk.{index}.ffn_{kind}_exps") for kind in ("gate", "up", "down")
        )

    @property
    def stacks(self) -> tuple[ExpertStack, ExpertStack, ExpertStack]:
        """Gate, up and down."""
        return self.gate, self.up, self.down


def gather_experts(
    routing: Routing, layers: Sequence[ExpertWeights | None], hidden: int, *, reads_ahead: bool
) -> Experts:
    """Return all layers' experts as the kernels take them; dense layers, which come first, have None."""
    mixtures = [layer for layer in layers if layer is not None]
    dense = len(layers) - len(mixtures)  # they come first
    if not mixtures:
        return _no_experts(routing, len(layers), hidden)
    stacks = [layer.stacks for layer in mixtures]
    return Experts(
        routing=routing,
        dense_layers=dense,
        routers=_of_layers(dense, [layer.router for layer in mixtures]),
        router_biases=_of_layers(dense, [layer.router_bias for layer in mixtures]),
        selection_biases=_of_layers(dense, [layer.selection_bias for layer in mixtures]),
        addresses=_of_layers(dense, [np.array([stack.data.ctypes.data for stack in kinds]) for kinds in stacks]),
        expert_bytes=_of_layers(dense, [np.array([stack.expert_bytes for stack in kinds]) for kinds in stacks]),
        depths=_of_layers(dense, [np.array([stack.depth for stack in kinds]) for kinds in stacks]),
        steps=_of_layers(dense, [np.stack([stack.steps for stack in kinds]) for kinds in stacks]),
        gate_biases=_of_layers(dense, [layer.gate.biases for layer in mixtures]),
        up_biases=_of_layers(dense, [layer.up.biases for layer in mixtures]),
        down_biases=_of_layers(dense, [layer.down.biases for layer in mixtures]),
        reads_ahead=reads_ahead,
    )


def _of_layers(dense: int, arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Return an array of all layers from those of the mixtures, with zeros for the dense layers before them."""
    return np.stack([np.zeros_like(arrays[0])] * dense + list(arrays))


def _no_experts(routing: Routing, layers: int, hidden: int) -> Experts:
    none, no_biases = np.zeros((layers, 0), np.float32), np.zeros((layers, 0, 0), np.float32)
    numbers = np.zeros((layers, 3), np.int64)
    return Experts(
        routing=routing,
        dense_layers=layers,
        routers=np.zeros((layers, 0, hidden), np.float32),
        router_biases=none,
        selection_biases=none,
        addresses=numbers,
        expert_bytes=numbers,
        depths=numbers,
        steps=np.zeros((layers, 3, 0, TABLE_SIZE), np.float32),
        gate_biases=no_biases,
        up_biases=no_biases,
        down_biases=no_biases,
        reads_ahead=False,
    )


def read_float32(file: GgufFile, name: str) -> np.ndarray:
    """Return a float32 tensor, a view of the map; its shape has been checked."""
    info = file.tensors[name]
    if info.type_id != F32:
        raise DamagedFileError(f"{file.path}: tensor {name} is {info.type_name}, not F32; convert the model again")
    return file.raw(name).view(np.float32).reshape(info.shape)


def _read_optional(file: GgufFile, name: str) -> np.ndarray:
    return read_float32(file, name) if name in file.tensors else np.zeros(0, np.float32)


def _read_stack(file: GgufFile, name: str) -> ExpertStack:
    """Return the matrices of all experts, with their biases if there are some."""
    info, bias = file.tensors[f"{name}.weight"], f"{name}.bias"
    biases = read_float32(file, bias) if bias in file.tensors else _NO_BIASES
    experts, rows, columns = info.shape
    data = file.raw(info.name)
    if is_trit_type(info.type_id):
        depth, codebooks = TritType(info.type_id).depth, file.codebooks(info.name)
        return ExpertStack(data, experts, rows, columns, depth, codebooks, biases)
    if info.type_id == F16:
        return ExpertStack(data, experts, rows, columns, HALVES, np.zeros((experts, 0), np.float32), biases)
    raise DamagedFileError(
        f"{file.path}: tensor {info.name} is {info.type_name}, but only trit files are run; make one with"
        " `tritgguf convert`"
    )
