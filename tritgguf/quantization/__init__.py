"""Quantization of one matrix: encoders, codebooks and exact recovery."""
