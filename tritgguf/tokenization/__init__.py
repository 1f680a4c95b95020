"""Tokenizers and chat templates, in both formats."""
