"""The cost of quantization: divergences and answers."""
