"""Model families: names, metadata keys and sizes in Hugging Face checkpoints and in GGUF.

`table` has one entry per family, and `keys` one rule per metadata key. The other modules apply them: `dimensions` to
sizes and shapes, `tensor_names` to tensor names and row order, `hf_to_gguf` and `gguf_to_hf` to configurations, `rope`
and `rope_keys` to the rotary embedding.
"""
