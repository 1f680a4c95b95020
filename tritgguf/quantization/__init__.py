"""One matrix to trits: encoders, codebooks and exact recovery."""
