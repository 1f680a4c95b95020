"""Model families: their names, keys and sizes in Hugging Face checkpoints and in GGUF.

`table` has one entry for each family and `keys` one rule for each key. The other modules apply them: `dimensions` to
sizes and shapes, `tensor_names` to names and rows, `hf_to_gguf` and `gguf_to_hf` to configurations, `rope` and
`rope_keys` to the rotation.
"""
