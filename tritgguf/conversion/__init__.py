"""Convert a source to a packed GGUF file: plan, encode, write, report."""
