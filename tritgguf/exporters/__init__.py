"""Export a packed file for other programs: as a Hugging Face folder or a stock GGUF file."""
