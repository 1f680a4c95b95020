"""Model families: their names, keys and sizes in Hugging Face checkpoints and in GGUF."""
