"""File formats: GGUF, safetensors, imatrix. Input is untrusted and checked before use."""
