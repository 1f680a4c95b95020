"""How close a packed model is to its source: logits, divergence, perplexity."""
