"""Files on the disk: GGUF, safetensors, imatrix; every byte is checked before it is used."""
