"""From a packed file to what other programs load: Hugging Face folders and stock GGUF files."""
