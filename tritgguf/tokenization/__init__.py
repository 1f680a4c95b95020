"""Tokenizers, their conversion between Hugging Face and GGUF, and chat templates."""
