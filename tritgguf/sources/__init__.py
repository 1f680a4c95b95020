"""What a conversion reads: Hugging Face folders, hub ids and GGUF files."""
