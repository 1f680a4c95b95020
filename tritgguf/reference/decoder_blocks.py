"""A source model in transformers, one decoder block in memory at a time.

Calibration sends text through the model block by block: what a block makes of the hidden states is all that the next
one needs. The model is built on torch's meta device, where weights take no memory; a block's weights are read when it
is opened and dropped when it is closed. transformers itself runs the block, as part of a model whose other blocks pass
their input on, so masks, rotation and what else sets one family apart are its own.

torch and transformers are imported inside functions: only the `verify` extra brings them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from tritgguf.architectures.tensor_names import from_hf, hf_tensor_name, quantized_tensor, to_hf
from tritgguf.reference.known_inputs import Ending, Gathered, find_endings
from tritgguf.reference.model import head_counts, meta_module, require_torch
from tritgguf.reference.process_settings import silent_transformers, torch_threads

if TYPE_CHECKING:
    from torch import Tensor

    from tritgguf.sources.source import Source

_EMBEDDINGS = "token_embd.weight"
_TOKENS_AT_ONCE = 4096

Visit = Callable[["Tensor"], None]
"""Called with a matrix's inputs of some windows, float32 [windows, tokens, columns]."""
Known = Mapping[Ending, "Tensor"]
"""All inputs of the last matrix of a module, float32 [windows, tokens, columns]."""


class _EnoughError(Exception):
    """The rest of a forward pass is not needed."""


class DecoderBlocks:
    """The decoder blocks of a source, in float32.

    Raises TritGgufError when torch or transformers is missing or cannot build the model.
    `threads` is how many threads torch computes with, here and while a block is open; None leaves it to torch.
    """

    def __init__(self, source: Source, *, threads: int | None = None) -> None:
        require_torch()
        import torch

        self._source, self._threads = source, threads
        self._metadata = {key: value.value for key, value in source.metadata.items()}
        self._module = meta_module(source)
        self._layers = list(self._module.model.layers)
        for index, layer in enumerate(self._layers):
            self._module.model.layers[index] = _pass_on(layer)
        self._module.model.norm = torch.nn.Identity()

    @property
    def count(self) -> int:
        """How many blocks there are."""
        return len(self._layers)

    def embed(self, windows: Sequence[Sequence[int]]) -> Tensor:
        """Return what the first block is given: float32 [windows, tokens, width]; all windows are equally long."""
        import torch

        ids = np.asarray(windows)
        wanted, places = np.unique(ids, return_inverse=True)
        embeddings = self._module.get_input_embeddings()
        # The model's own module, with the rows that occur alone: some families scale what it returns.
        embeddings.weight = torch.nn.Parameter(torch.from_numpy(self._rows(wanted)), requires_grad=False)
        embeddings.padding_idx = None
        taken: list[Tensor] = []
        look = _before(self._module.model.layers[0], lambda x: taken.append(x.clone()))
        with torch_threads(self._threads), torch.inference_mode(), look:
            for some in self.portions(torch.from_numpy(places.reshape(ids.shape))):
                self._forward(embeddings(some))
        embeddings.to("meta")
        return torch.cat(taken)

    @contextmanager
    def block(self, index: int) -> Iterator[Block]:
        """Open a block; its weights are in memory until the context ends."""
        layer = self._layers[index].to_empty(device="cpu").requires_grad_(False)
        arch = self._metadata["general.architecture"]
        parameters = {f"model.layers.{index}.{name}": value for name, value in layer.named_parameters()}
        prefix = f"blk.{index}."
        names = [tensor.name for tensor in self._source.tensors if tensor.name.startswith(prefix)]
        block = Block(self, index, {name: parameters[hf_tensor_name(arch, name)] for name in names})
        for name in names:
            block.set(name, self._source.read(name))
            self._source.release(name)
        passing_on = self._module.model.layers[index]
        self._module.model.layers[index] = layer
        try:
            with torch_threads(self._threads):
                yield block
        finally:
            self._module.model.layers[index] = passing_on
            self._layers[index] = layer.to("meta")

    def heads(self) -> tuple[int, int]:
        """Return the numbers of query heads and of key-value heads."""
        return head_counts(self._metadata)

    @property
    def architecture(self) -> str:
        """The GGUF name of the model's architecture."""
        return str(self._metadata["general.architecture"])

    def layer(self, index: int) -> Any:
        """Return the module that is in the place of a block: itself where it is open."""
        return self._module.model.layers[index]

    def run(self, hidden: Tensor, index: int, on_output: Callable[[Tensor], None] | None) -> None:
        """Send hidden states [windows, tokens, width] through an open block, some windows at a time.

        Without `on_output`, hooks see what they want to see and may end each pass by `_EnoughError`.
        """
        layer = self.layer(index)
        for some in self.portions(hidden):
            outputs: list[Tensor] = []
            # Families that scale embeddings would scale these too: the block is given its input right at its door.
            with _given(layer, some), _after(layer, outputs.append):
                try:
                    self._forward(some)
                except _EnoughError:
                    continue
            if on_output is not None:
                on_output(outputs[0])

    @staticmethod
    def portions(windows: Tensor) -> Sequence[Tensor]:
        """Return what goes through a block at once of something [windows, tokens, ...]."""
        return windows.split(max(1, _TOKENS_AT_ONCE // windows.shape[1]))

    def _forward(self, embedded: Tensor) -> None:
        with silent_transformers():
            self._module.model(inputs_embeds=embedded, use_cache=False)

    def _rows(self, wanted: np.ndarray) -> np.ndarray:
        """Return rows of the embeddings by ascending numbers, float32, without holding the whole matrix."""
        from tritgguf.formats.dtypes import to_float32

        found, first = [], 0
        for rows in self._source.rows(_EMBEDDINGS).blocks():
            here = wanted[(wanted >= first) & (wanted < first + len(rows))] - first
            found.append(to_float32(rows[here]))
            first += len(rows)
        self._source.release(_EMBEDDINGS)
        return np.concatenate(found)


class Block:
    """An open decoder block.

    Attributes:
        matrices: GGUF name -> the parameter of each matrix that is packed, float32, in transformers' row order;
            what is written into one counts from then on.

    """

    def __init__(self, blocks: DecoderBlocks, index: int, parameters: dict[str, Any]) -> None:
        self._blocks, self.index, self._parameters = blocks, index, parameters
        self.matrices = {name: value for name, value in parameters.items() if quantized_tensor(name)}

    def get(self, name: str) -> np.ndarray:
        """Return a copy of a weight in GGUF's row order, float32."""
        return self.in_file_order(name, self._parameters[name].detach().numpy().copy())

    def set(self, name: str, weights: np.ndarray) -> None:
        """Replace a weight, given in GGUF's row order."""
        np.copyto(self._parameters[name].detach().numpy(), self.in_module_order(name, weights))

    def in_module_order(self, name: str, array: np.ndarray) -> np.ndarray:
        """Return what belongs to the rows of a weight, in GGUF's order, in transformers' order."""
        return to_hf(self._blocks.architecture, name, array, *self._blocks.heads())

    def in_file_order(self, name: str, array: np.ndarray) -> np.ndarray:
        """Return what belongs to the rows of a weight, in transformers' order, in GGUF's order."""
        return from_hf(self._blocks.architecture, name, array, *self._blocks.heads())

    def forward(
        self, hidden: Tensor, visits: Mapping[str, Visit] | None = None, *, known: Known | None = None
    ) -> Tensor:
        """Return what the block makes of hidden states, both float32 [windows, tokens, width].

        `visits` and `known` are as in `inputs`.
        """
        import torch

        outputs = Gathered(len(hidden))
        with torch.inference_mode(), self._skipping(known), self._shown(visits or {}, None):
            self._blocks.run(hidden, self.index, outputs.add)
        return outputs.whole

    def differentiable(self, hidden: Tensor) -> Tensor:
        """Return what the block makes of a few windows of hidden states, with what gradients need."""
        import torch

        outputs: list[Tensor] = []
        self._blocks.run(hidden, self.index, outputs.append)
        return torch.cat(outputs)

    def input_groups(self, hidden: Tensor) -> list[tuple[str, ...]]:
        """Return the packed matrices in the order of their computation; those that share an input are together."""
        import torch

        calls: list[tuple[int, str]] = []
        kept = []  # so that no two inputs have one address
        hooks = []
        for name in self.matrices:

            def note(module: Any, arguments: Any, name: str = name) -> None:
                kept.append(arguments[0])
                calls.append((id(arguments[0]), name))

            hooks.append(self.linear(name).register_forward_pre_hook(note))
        try:
            with torch.inference_mode():
                self._blocks.run(hidden[:1], self.index, None)
        finally:
            for hook in hooks:
                hook.remove()
        groups: dict[int, list[str]] = {}
        for address, name in calls:
            groups.setdefault(address, []).append(name)
        return [tuple(names) for names in groups.values()]

    def inputs(self, hidden: Tensor, visits: Mapping[str, Visit], *, last: str, known: Known | None = None) -> None:
        """Show the inputs of matrices to their visitors.

        Args:
            hidden: float32 [windows, tokens, width].
            visits: GGUF name of a packed matrix -> what to call with its inputs, some windows after the others.
            last: the matrix behind whose visit the block is left.
            known: of some of `endings`, the inputs that an earlier pass of the same hidden states has shown;
                what else is in their modules is not computed.

        """
        import torch

        with torch.inference_mode(), self._skipping(known), self._shown(visits, last):
            self._blocks.run(hidden, self.index, None)

    def endings(self, hidden: Tensor) -> dict[str, Ending]:
        """Return GGUF name -> the ending of each packed matrix whose product is what the module around it returns."""
        import torch

        def run() -> None:
            with torch.inference_mode():
                self._blocks.run(hidden[:1], self.index, None)

        layer = self._blocks.layer(self.index)
        around = {name: layer.get_submodule(self._path(name).rpartition(".")[0]) for name in self.matrices}
        return find_endings({name: (self.linear(name), around[name]) for name in self.matrices}, run)

    @contextmanager
    def _skipping(self, known: Known | None) -> Iterator[None]:
        with ExitStack() as stack:
            for ending, inputs in (known or {}).items():
                stack.enter_context(ending.alone(self._blocks.portions(inputs)))
            yield

    @contextmanager
    def _shown(self, visits: Mapping[str, Visit], last: str | None) -> Iterator[None]:
        hooks = []
        for name, visit in visits.items():

            def show(module: Any, arguments: Any, name: str = name, visit: Visit = visit) -> None:
                visit(arguments[0])
                if name == last:
                    raise _EnoughError

            hooks.append(self.linear(name).register_forward_pre_hook(show))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def linear(self, name: str) -> Any:
        """Return the module that multiplies with a matrix."""
        return self._blocks.layer(self.index).get_submodule(self._path(name))

    def _path(self, name: str) -> str:
        """Return where in the layer a matrix is."""
        return hf_tensor_name(self._blocks.architecture, name).removesuffix(".weight").split(".", 3)[3]


def _pass_on(layer: Any) -> Any:
    """Return a module that stands in for a decoder layer and returns its input."""
    import torch

    class PassOn(torch.nn.Module):
        def forward(self, hidden_states: Any, *arguments: Any, **settings: Any) -> Any:
            return hidden_states

    module = PassOn()
    module.attention_type = getattr(layer, "attention_type", None)
    return module


@contextmanager
def _before(module: Any, look: Callable[[Any], Any]) -> Iterator[None]:
    """Show the hidden states that a layer is given."""

    def hook(module: Any, arguments: Any, settings: Any) -> None:
        look(arguments[0] if arguments else settings["hidden_states"])

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _given(module: Any, hidden: Any) -> Iterator[None]:
    """Give a layer these hidden states instead of its own."""

    def hook(module: Any, arguments: Any, settings: Any) -> Any:
        if arguments:
            return (hidden, *arguments[1:]), settings
        return arguments, {**settings, "hidden_states": hidden}

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _after(module: Any, look: Callable[[Any], Any]) -> Iterator[None]:
    """Show the hidden states that a layer returns."""

    def hook(module: Any, arguments: Any, output: Any) -> None:
        look(output[0] if isinstance(output, tuple) else output)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
