"""The source model in transformers: the only home of transformers."""
