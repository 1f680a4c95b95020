"""Sources of a conversion: Hugging Face folders, hub ids and GGUF files."""
