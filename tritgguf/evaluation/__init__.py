"""Compare a packed model with its source: logits, KL divergence, perplexity."""
