"""The model in transformers, in float32: the reference of `verify`.

transformers computes all logits; this module only supplies the weights. transformers loads a Hugging Face folder by
itself, so that tensor names, rope scaling and row order are checked against independent code. For a stock GGUF file,
the model is built from the metadata keys and filled with the dequantized tensors.

torch and transformers are imported inside functions because only the `verify` extra installs them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tritgguf.architectures.delta_net import delta_net_of
from tritgguf.architectures.gguf_to_hf import config_entries, model_type_of
from tritgguf.architectures.rope import FACTOR_TENSORS, LONG_FACTORS, ROPE_FREQS
from tritgguf.architectures.rope_keys import long_rope_scaling
from tritgguf.architectures.table import GGUF_ARCHITECTURES
from tritgguf.architectures.tensor_names import hf_tensor_name, module_parameter, to_hf, without_unit_axis
from tritgguf.errors import DamagedFileError, MissingExtraError
from tritgguf.reference.process_settings import import_torch, silent_transformers, torch_threads

if TYPE_CHECKING:
    from pathlib import Path

    from tritgguf.formats.gguf_file import GgufFile
    from tritgguf.sources.source import Source

_HEAD = "output.weight"


def require_torch() -> None:
    """Raise MissingExtraError unless torch and transformers can be imported."""
    for package in ("torch", "transformers"):
        try:
            if package == "torch":
                import_torch()
            importlib.import_module(package)
        except ImportError as error:
            raise MissingExtraError(
                f"this needs {package}, which cannot be imported ({_first_line(error)});"
                " pip install torch transformers accelerate"
            ) from error


class ReferenceModel:
    """A causal language model of transformers in float32, on the CPU.

    `threads` is the number of torch's threads; None keeps torch's setting.
    """

    def __init__(self, module: Any, *, threads: int | None = None) -> None:
        self.module = module.eval()
        self._threads = threads

    @classmethod
    def open(cls, source: Source, *, threads: int | None = None) -> ReferenceModel:
        """Load a source with its own weights; TritGgufError if transformers cannot load it."""
        from tritgguf.sources.hf_folder import HfFolderSource

        require_torch()
        if isinstance(source, HfFolderSource) and not source.is_multimodal:
            return cls(_load_folder(source.folder), threads=threads)
        metadata = {key: value.value for key, value in source.metadata.items()}
        shapes = {tensor.name: tensor.shape for tensor in source.tensors}
        model = cls(_uninitialized_module(source), threads=threads)
        model.load_tensors(metadata, list(shapes), source.read, source.name)
        if ROPE_FREQS in shapes:
            apply_rope_factors(model.module, source.read(ROPE_FREQS))
        return model

    def load_file(self, file: GgufFile, *, progress: Callable[[int, int], None] | None = None) -> None:
        """Replace every weight in place by the file's dequantized weight."""
        self.load_tensors(file.metadata, list(file.tensors), file.read_float32, str(file.path), progress=progress)

    def load_tensors(
        self,
        metadata: Mapping[str, Any],
        names: Sequence[str],
        read: Callable[[str], np.ndarray],
        where: str,
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Replace every weight in place by that of a GGUF model.

        `read` returns a tensor by its GGUF name, float32 in GGUF's row order. If there is no output.weight, the
        embeddings are tied. Factors of the rotation are skipped: a Hugging Face model has them from its config.
        Raises TritGgufError if a tensor is unknown to the model, is missing, or has another shape.
        """
        arch = metadata["general.architecture"]
        heads, kv_heads = head_counts(metadata)
        delta_net = delta_net_of(metadata, GGUF_ARCHITECTURES[arch], where)
        tied = _HEAD not in names
        self._set_head(tied)
        parameters = {**persistent_buffers(self.module), **dict(self.module.named_parameters(remove_duplicate=False))}
        missing = set(parameters)
        if tied:
            missing.remove(hf_tensor_name(arch, _HEAD))
        for done, name in enumerate(names):
            if progress is not None:
                progress(done, len(names))
            if name in FACTOR_TENSORS:
                continue
            hf_name, part = module_parameter(arch, name)
            weights = to_hf(arch, name, read(name), heads, kv_heads, delta_net)
            place = None if hf_name not in parameters else part.view(parameters[hf_name].detach().numpy())
            if place is not None and without_unit_axis(name, place.shape) == weights.shape:
                weights = weights.reshape(place.shape)
            if place is None or place.shape != weights.shape:
                raise DamagedFileError(f"{where}: the source's model has no tensor {name} of shape {weights.shape}")
            np.copyto(place, weights)
            missing.discard(hf_name)
        if missing:
            raise DamagedFileError(f"{where}: no tensor for {min(missing)} of the source's model")

    def _set_head(self, tied: bool) -> None:
        """Tie the output head to the embeddings, or give it its own matrix."""
        import torch

        head, embeddings = self.module.lm_head, self.module.get_input_embeddings()
        if tied:
            head.weight = embeddings.weight
        elif head.weight is embeddings.weight:
            head.weight = torch.nn.Parameter(torch.empty_like(embeddings.weight), requires_grad=False)

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """Return the logits at every position of one sequence: float32 [n, vocabulary]."""
        import torch

        with silent_transformers(), torch_threads(self._threads), torch.inference_mode():
            return self.module(torch.tensor([list(tokens)]), use_cache=False).logits[0].numpy()

    def greedy(self, prompt: Sequence[int], count: int, stop_tokens: Collection[int] = ()) -> list[int]:
        """Return `count` tokens of greedy decoding after the prompt, or fewer: a stop token ends it and is left out."""
        import torch
        from transformers import GenerationConfig

        # A new config, because the checkpoint's own may set a repetition penalty.
        self.module.generation_config = GenerationConfig(
            do_sample=False, max_new_tokens=count, eos_token_id=sorted(stop_tokens) or None, pad_token_id=0
        )
        ids = torch.tensor([list(prompt)])
        with silent_transformers(), torch_threads(self._threads), torch.inference_mode():
            answer = self.module.generate(ids, attention_mask=torch.ones_like(ids))[0, len(prompt) :].tolist()
        return answer[:-1] if answer and answer[-1] in stop_tokens else answer


def head_counts(metadata: Mapping[str, Any]) -> tuple[int, int]:
    """Return the numbers of query heads and of key-value heads of a GGUF model."""
    arch = metadata["general.architecture"]
    heads = metadata[f"{arch}.attention.head_count"]
    kv_heads = metadata.get(f"{arch}.attention.head_count_kv", heads)
    return heads, max(kv_heads) if isinstance(kv_heads, list) else kv_heads  # a list has 0 for layers without attention


def _load_folder(folder: Path) -> Any:
    """Load a Hugging Face folder; TritGgufError if transformers cannot load it or a weight is missing."""
    import torch
    import transformers

    loader: Any = transformers.AutoModelForCausalLM

    with silent_transformers():
        try:
            module, found = loader.from_pretrained(
                folder,
                dtype=torch.float32,
                local_files_only=True,
                attn_implementation="eager",
                output_loading_info=True,
            )
        except Exception as error:  # transformers does not document what it raises
            raise DamagedFileError(f"{folder}: transformers cannot load it ({_first_line(error)})") from error
    if found["missing_keys"]:
        raise DamagedFileError(f"{folder}: transformers finds no weights for {min(found['missing_keys'])}")
    return module


def persistent_buffers(module: Any) -> dict[str, Any]:
    """Return name -> buffer of those that checkpoints have."""
    stored = module.state_dict()
    return {name: buffer for name, buffer in module.named_buffers() if name in stored}


def apply_rope_factors(module: Any, factors: np.ndarray) -> None:
    """Divide the rotation frequencies by the factors of rope_freqs.weight, float32 [head_dim / 2]."""
    getattr(module.model, _rotation_name(module)).inv_freq.numpy()[:] /= factors


def _rotation_name(module: Any) -> str:
    """Return the name of the submodule with the rotary frequencies, which LFM2-MoE calls otherwise than all others."""
    return "rotary_emb" if hasattr(module.model, "rotary_emb") else "pos_emb"


def _uninitialized_module(source: Source) -> Any:
    """Return a module with uninitialized weights."""
    config = _config(source)
    # The meta device skips the random initialization of weights, which would take most of the time.
    module = _on_meta(config, attn_implementation="eager").to_empty(device="cpu")
    _restore_buffers(module, config)
    return module


def meta_module(source: Source) -> Any:
    """Return the model of a source on torch's meta device, where weights take no memory, with real rotary frequencies.

    Raises TritGgufError if transformers cannot build it.
    """
    from transformers import AutoConfig

    from tritgguf.sources.hf_folder import HfFolderSource

    is_text_folder = isinstance(source, HfFolderSource) and not source.is_multimodal
    if isinstance(source, HfFolderSource) and is_text_folder:
        with silent_transformers():
            try:
                config = AutoConfig.from_pretrained(source.folder, local_files_only=True)
            except Exception as error:  # transformers does not document what it raises
                raise DamagedFileError(
                    f"{source.folder}: transformers cannot read its config ({_first_line(error)})"
                ) from error
    else:
        config = _config(source)
    module = _on_meta(config)
    _restore_buffers(module, config)
    if not is_text_folder and any(tensor.name == ROPE_FREQS for tensor in source.tensors):
        apply_rope_factors(module, source.read(ROPE_FREQS))  # a folder has the factors in its config
    return module.eval()


def identity_layer(layer: Any) -> Any:
    """Return a module that replaces a decoder layer and returns its input."""
    import torch

    class IdentityLayer(torch.nn.Module):
        def forward(self, hidden_states: Any, *arguments: Any, **settings: Any) -> Any:
            return hidden_states

    module = IdentityLayer()
    module.attention_type = getattr(layer, "attention_type", None)
    return module


def _config(source: Source) -> Any:
    """Return transformers' config of a GGUF model."""
    import transformers

    metadata = {key: value.value for key, value in source.metadata.items()}
    shapes = {tensor.name: tensor.shape for tensor in source.tensors}
    entries = config_entries(metadata, shapes, source.name)
    if LONG_FACTORS in shapes:
        has_mscales = GGUF_ARCHITECTURES[metadata["general.architecture"]].has_mscales
        scaling = long_rope_scaling(source.read, metadata, entries, source.name, has_mscales=has_mscales)
        entries["rope_parameters"] |= {"rope_type": "longrope", **scaling}
    # The default token ids of the config class may be outside the vocabulary.
    ids: dict[str, Any] = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    return transformers.AutoConfig.for_model(model_type_of(metadata, source.name), **ids, **entries)


def _on_meta(config: Any, **settings: Any) -> Any:
    import torch
    import transformers

    with silent_transformers(), torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, **settings)


def _restore_buffers(module: Any, config: Any) -> None:
    """Recompute the buffers that the meta device discards: the rotary frequencies and the scale of embeddings."""
    import torch

    name = _rotation_name(module)
    setattr(module.model, name, type(getattr(module.model, name))(config))
    embeddings = module.get_input_embeddings()
    if hasattr(embeddings, "scalar_embed_scale"):
        embeddings.embed_scale = torch.tensor(embeddings.scalar_embed_scale)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
