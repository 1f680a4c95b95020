"""The source model, computed by transformers. Only this room imports transformers."""
