"""A source model in transformers, with one decoder block in memory at a time.

Calibration sends text through the model block by block, because the next block needs only the hidden states. The model
is built on torch's meta device, where weights take no memory. A block's weights are read when it is opened and freed
when it is closed. transformers runs the whole model with identity layers in place of all other blocks, so it applies
the masks, rotary embeddings and other details of each family itself.

torch and transformers are imported inside functions because only the `verify` extra installs them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from tritgguf.architectures import tensor_names
from tritgguf.architectures.delta_net import DELTA_OUTPUT, delta_net_of
from tritgguf.architectures.short_convolutions import CONVOLUTION_OUTPUT
from tritgguf.architectures.table import GGUF_ARCHITECTURES
from tritgguf.formats.dtypes import to_float32
from tritgguf.formats.stacks import split_matrix_name
from tritgguf.reference.cached_products import OutputProjection, RowBuffer, find_output_projections
from tritgguf.reference.expert_layer import find_experts
from tritgguf.reference.hooks import capture_input, capture_output, replace_input
from tritgguf.reference.model import (
    head_counts,
    identity_layer,
    meta_module,
    persistent_buffers,
    require_torch,
)
from tritgguf.reference.process_settings import silent_transformers, torch_threads
from tritgguf.reference.residual_stream import ResidualStream

if TYPE_CHECKING:
    from torch import Tensor

    from tritgguf.architectures.tensor_part import TensorPart
    from tritgguf.sources.source import Source

_EMBEDDINGS = "token_embd.weight"
_BATCH_TOKENS = 4096
_PROBE = slice(1), slice(16)  # windows and tokens that show how a block's modules are connected

Observer = Callable[["Tensor"], None]
"""Called with a matrix's inputs for a batch of windows, float32 [windows, tokens, columns]."""
CachedProducts = Mapping[OutputProjection, "Tensor"]
"""Output projection -> its product for all windows, float32 [windows, tokens, width]."""


class _StopForwardError(Exception):
    """Raised by a hook to skip the rest of a forward pass."""


class DecoderBlocks:
    """The decoder blocks of a source, in float32.

    `threads` is the number of torch's threads, in `embed` and while a block is open; None keeps torch's setting.
    Raises TritGgufError if torch or transformers is missing or cannot build the model.
    """

    def __init__(self, source: Source, *, threads: int | None = None) -> None:
        require_torch()
        import torch

        self.source, self._threads = source, threads
        self._metadata = {key: value.value for key, value in source.metadata.items()}
        self._module = meta_module(source)
        self._layers = list(self._module.model.layers)
        for index, layer in enumerate(self._layers):
            self._module.model.layers[index] = identity_layer(layer)
        self.entry = GGUF_ARCHITECTURES[self.architecture]
        self.delta_net = delta_net_of(self._metadata, self.entry, source.name)
        self.sizes = *head_counts(self._metadata), self.delta_net  # what changes the order of rows
        setattr(self._module.model, self.entry.final_norm[1].removeprefix("model."), torch.nn.Identity())

    @property
    def count(self) -> int:
        """Number of blocks."""
        return len(self._layers)

    def embed(
        self, windows: Sequence[Sequence[int]], change: Callable[[np.ndarray], np.ndarray] = lambda rows: rows
    ) -> Tensor:
        """Return the first block's input, float32 [windows, tokens, width], for windows of equal length.

        `change` replaces the embeddings of the tokens that occur, float32 [tokens, columns].
        """
        import torch

        ids = np.asarray(windows)
        used, indices = np.unique(ids, return_inverse=True)
        embeddings = self._module.get_input_embeddings()
        # Only rows of used tokens are loaded. The model's own module looks them up: some families scale its output.
        embeddings.weight = torch.nn.Parameter(
            torch.from_numpy(change(self._embedding_rows(used))), requires_grad=False
        )
        embeddings.padding_idx = None
        captured: list[Tensor] = []
        capture = capture_input(self._module.model.layers[0], lambda x: captured.append(x.clone()))
        with silent_transformers(), torch_threads(self._threads), torch.inference_mode(), capture:
            for batch in self.batches(torch.from_numpy(indices.reshape(ids.shape))):
                self._forward(embeddings(batch))
        # The weight alone: some families keep the scale beside it, which the next text needs.
        embeddings.weight = torch.nn.Parameter(embeddings.weight.to("meta"), requires_grad=False)
        return torch.cat(captured)

    @contextmanager
    def block(self, index: int) -> Iterator[Block]:
        """Open a block; its weights are in memory until the context ends."""
        layer = self._layers[index].to_empty(device="cpu").requires_grad_(False)
        tensors_of_layer = {**persistent_buffers(layer), **dict(layer.named_parameters())}
        parameters = {f"model.layers.{index}.{name}": value for name, value in tensors_of_layer.items()}
        tensors = [tensor for tensor in self.source.tensors if tensor.name.startswith(f"blk.{index}.")]
        places = {tensor.name: tensor_names.module_parameter(self.architecture, tensor.name) for tensor in tensors}
        parts = {name: (parameters[of], part) for name, (of, part) in places.items()}
        block = Block(self, index, layer, parts)
        for tensor in tensors:
            block.restore(tensor.matrices)
        identity = self._module.model.layers[index]
        self._module.model.layers[index] = layer
        try:
            with torch_threads(self._threads), silent_transformers():
                yield block
        finally:
            self._module.model.layers[index] = identity
            self._layers[index] = layer.to("meta")

    @property
    def architecture(self) -> str:
        """The GGUF name of the model's architecture."""
        return str(self._metadata["general.architecture"])

    def layer(self, index: int) -> Any:
        """Return the module at a block's position: the block itself if it is open, else an identity layer."""
        return self._module.model.layers[index]

    def run(self, hidden: Tensor, index: int, on_output: Callable[[Tensor], None] | None) -> None:
        """Send hidden states [windows, tokens, width] through an open block, in batches of windows.

        If `on_output` is None, only hooks use the pass, and they may end each batch with `_StopForwardError`.
        """
        layer = self.layer(index)
        with silent_transformers():
            for batch in self.batches(hidden):
                outputs: list[Tensor] = []
                # A hook replaces the block's input, because the model may have scaled it like embeddings on the way.
                with replace_input(layer, batch), capture_output(layer, outputs.append):
                    try:
                        self._forward(batch)
                    except _StopForwardError:
                        continue
                if on_output is not None:
                    on_output(outputs[0])

    @staticmethod
    def batches(windows: Tensor) -> Sequence[Tensor]:
        """Split a tensor [windows, tokens, ...] into batches of windows."""
        return windows.split(max(1, _BATCH_TOKENS // windows.shape[1]))

    def _forward(self, embedded: Tensor) -> None:
        self._module.model(inputs_embeds=embedded, use_cache=False)

    def _embedding_rows(self, tokens: np.ndarray) -> np.ndarray:
        """Return the embeddings of ascending token ids, float32, without holding the whole matrix."""
        found, first = [], 0
        for rows in self.source.rows(_EMBEDDINGS).blocks():
            indices = tokens[(tokens >= first) & (tokens < first + len(rows))] - first
            found.append(to_float32(rows[indices]))
            first += len(rows)
        self.source.release(_EMBEDDINGS)
        return np.concatenate(found)


class Block:
    """An open decoder block.

    Attributes:
        matrices: GGUF name -> parameter of each matrix that is packed, float32, in transformers' row order. Writing
            into a parameter changes the block. The experts' are not among them.
        layer: its module in transformers.
        parts: GGUF name -> the parameter of transformers that holds a weight, and which part of it that is.
        vectors: GGUF names of norms and biases.
        experts: the experts; None in a dense model.

    Methods take the names of experts' matrices (see `stacks`) too, except where they speak of inputs.
    """

    def __init__(self, blocks: DecoderBlocks, index: int, layer: Any, parts: dict[str, tuple[Any, TensorPart]]) -> None:
        self._blocks, self.index, self.layer, self.parts = blocks, index, layer, parts
        self._parameters = {name: part.view(parameter) for name, (parameter, part) in parts.items()}
        of_dimensions = [{n: value for n, value in self._parameters.items() if value.dim() == d} for d in (1, 2)]
        self.vectors = list(filter(tensor_names.has_own_parameters, of_dimensions[0]))
        self.matrices = {n: value for n, value in of_dimensions[1].items() if tensor_names.quantized_tensor(n)}
        self.experts = find_experts(layer, self._parameters)

    @property
    def packed(self) -> list[str]:
        """Names of all matrices that are packed, the experts' included."""
        of_experts = [name for names in self.experts.names for name in names] if self.experts else []
        return [*self.matrices, *of_experts]

    def _weights(self, name: str) -> np.ndarray:
        """Return a weight in transformers' row order, as a view."""
        tensor, index = split_matrix_name(name)
        weights: np.ndarray = self._parameters[tensor].detach().numpy()
        return weights if index is None else weights[index]

    def get(self, name: str) -> np.ndarray:
        """Return a copy of a weight in GGUF's row order, float32."""
        return self.in_gguf_order(name, self._weights(name).copy())

    def set(self, name: str, weights: np.ndarray) -> None:
        """Replace a weight, given in GGUF's row order; a vector may be a single row."""
        place = self._weights(name)
        np.copyto(place, self.in_hf_order(name, weights.reshape(place.shape)))

    def restore(self, names: Iterable[str]) -> None:
        """Set weights to those of the source, which are read again: a copy of a stack would take much memory."""
        source = self._blocks.source
        for name in names:
            self.set(name, to_float32(source.rows(name).whole()))
            source.release(name)

    def in_hf_order(self, name: str, array: np.ndarray) -> np.ndarray:
        """Reorder the rows of an array, one per row of the weight, from GGUF's order to transformers'."""
        return tensor_names.to_hf(self._blocks.architecture, name, array, *self._blocks.sizes)

    def in_gguf_order(self, name: str, array: np.ndarray) -> np.ndarray:
        """Reorder the rows of an array, one per row of the weight, from transformers' order to GGUF's."""
        return tensor_names.from_hf(self._blocks.architecture, name, array, *self._blocks.sizes)

    def forward(
        self, hidden: Tensor, observers: Mapping[str, Observer] | None = None, *, cached: CachedProducts | None = None
    ) -> Tensor:
        """Return the block's output for hidden states, both float32 [windows, tokens, width].

        `observers` and `cached` are as in `observe_inputs`; here, they may also be those of experts' matrices, whose
        inputs are float32 [tokens, columns].
        """
        import torch

        outputs = RowBuffer(len(hidden))
        with torch.inference_mode(), self._replaying(cached), self._observing(observers or {}, None):
            self._blocks.run(hidden, self.index, outputs.add)
        return outputs.rows

    def forward_with_gradients(self, hidden: Tensor) -> Tensor:
        """Return the block's output for a few windows, as `forward` does, and record the graph for gradients."""
        import torch

        outputs: list[Tensor] = []
        self._blocks.run(hidden, self.index, outputs.append)
        return torch.cat(outputs)

    def input_groups(self, hidden: Tensor) -> list[tuple[str, ...]]:
        """Return the names of the packed matrices in execution order, grouped by shared input."""
        import torch

        calls: list[tuple[int, str]] = []
        alive = []  # keeps the inputs alive, so that their ids stay unique
        hooks = []
        for name in self.matrices:

            def record(module: Any, arguments: Any, name: str = name) -> None:
                alive.append(arguments[0])
                calls.append((id(arguments[0]), name))

            hooks.append(self.linear(name).register_forward_pre_hook(record))
        try:
            with torch.inference_mode():
                self._blocks.run(hidden[_PROBE], self.index, None)
        finally:
            for hook in hooks:
                hook.remove()
        groups: dict[int, list[str]] = {}
        for identity, name in calls:
            groups.setdefault(identity, []).append(name)
        return [tuple(names) for names in groups.values()]

    def observe_inputs(
        self,
        hidden: Tensor,
        observers: Mapping[str, Observer],
        *,
        last: str,
        cached: CachedProducts | None = None,
    ) -> None:
        """Call observers with the inputs of matrices.

        Args:
            hidden: float32 [windows, tokens, width].
            observers: GGUF name of a packed matrix -> function to call with its inputs, batch by batch.
            last: the matrix after whose observer the pass stops.
            cached: products of some `output_projections` for the same hidden states, from `products`. The rest of
                their parent modules is skipped.

        """
        import torch

        with torch.inference_mode(), self._replaying(cached), self._observing(observers, last):
            self._blocks.run(hidden, self.index, None)

    def expert_inputs(self, hidden: Tensor, *, cached: CachedProducts | None = None) -> Tensor:
        """Return the experts' inputs, float32 [tokens, width], for hidden states [windows, tokens, width]."""
        import torch

        assert self.experts is not None
        buffer = RowBuffer(hidden.shape[0] * hidden.shape[1])
        observing = self.experts.observing(lambda inputs, _: buffer.add(inputs), _StopForwardError)
        with torch.inference_mode(), self._replaying(cached), observing:
            self._blocks.run(hidden, self.index, None)
        return buffer.rows

    def output_projections(self, hidden: Tensor) -> dict[str, OutputProjection]:
        """Return GGUF name -> projection, of the packed matrices whose product is what their parent returns."""
        import torch

        def run() -> None:
            with torch.inference_mode():
                self._blocks.run(hidden[_PROBE], self.index, None)

        parents = {name: self.layer.get_submodule(self._path(name).rpartition(".")[0]) for name in self.matrices}
        return find_output_projections({name: (self.linear(name), parents[name]) for name in self.matrices}, run)

    def residual_streams(self, hidden: Tensor) -> dict[str, ResidualStream]:
        """Return GGUF name -> the residual stream around a matrix whose product is added to it as it is.

        Families that normalize or scale the product before they add it have no such matrices.
        """
        import torch

        parts = (self._blocks.entry.feed_forward_norm, "ffn_down", "attn_output", CONVOLUTION_OUTPUT, DELTA_OUTPUT)
        norm, down, *outputs = (f"blk.{self.index}.{part}.weight" for part in parts)
        names = [*(name for name in outputs if name in self.matrices), down]
        if norm not in self._parameters or not set(names) <= set(self.matrices):
            return {}
        seen: list[Tensor] = []  # the products, the norm's input between them, and the block's output
        with ExitStack() as hooks, torch.inference_mode(), self._observing({norm: seen.append}, None):
            for name in names:
                hook = self.linear(name).register_forward_hook(lambda module, inputs, product: seen.append(product))
                hooks.callback(hook.remove)
            self._blocks.run(hidden[_PROBE], self.index, seen.append)
        if len(seen) != 4:
            return {}
        after_attention, stream, after_feed_forward, output = seen
        found: dict[str, ResidualStream] = {}
        if torch.equal(hidden[_PROBE] + after_attention, stream):
            found[names[0]] = ResidualStream(before=None, after=norm)
        if torch.equal(stream + after_feed_forward, output):
            found[names[1]] = ResidualStream(before=norm, after=None)
        return found

    def products(self, projection: OutputProjection, inputs: Tensor) -> Tensor:
        """Return the product of an output projection, for inputs of all windows, float32 [windows, tokens, columns]."""
        import torch

        products = RowBuffer(len(inputs))
        name = next(name for name in self.matrices if self.linear(name) is projection.linear)
        with torch.inference_mode():
            for batch in self._blocks.batches(inputs):
                ordered = tensor_names.inputs_in_order(name, batch, self._blocks.delta_net, to_gguf=False)
                products.add(projection.linear(ordered))
        return products.rows

    @contextmanager
    def _replaying(self, cached: CachedProducts | None) -> Iterator[None]:
        with ExitStack() as stack:
            for projection, products in (cached or {}).items():
                stack.enter_context(projection.replay(self._blocks.batches(products)))
            yield

    @contextmanager
    def _observing(self, observers: Mapping[str, Observer], last: str | None) -> Iterator[None]:
        with ExitStack() as stack:
            of_experts = {name: observers[name] for name in observers if split_matrix_name(name)[1] is not None}
            if self.experts is not None and of_experts:
                stack.enter_context(self.experts.observing_matrices(of_experts))
            for name in (name for name in observers if name not in of_experts):

                def observe(module: Any, arguments: Any, name: str = name) -> None:
                    delta_net = self._blocks.delta_net
                    observers[name](tensor_names.inputs_in_order(name, arguments[0], delta_net, to_gguf=True))
                    if name == last:
                        raise _StopForwardError

                stack.callback(self.linear(name).register_forward_pre_hook(observe).remove)
            yield

    def linear(self, name: str) -> Any:
        """Return the linear module of a matrix."""
        return self.layer.get_submodule(self._path(name))

    def _path(self, name: str) -> str:
        """Return the path of a matrix's module within its layer."""
        parameter, _ = tensor_names.module_parameter(self._blocks.architecture, name)
        return parameter.removesuffix(".weight").split(".", 3)[3]
