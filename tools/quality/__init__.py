"""What quantization costs: divergences and answers."""
