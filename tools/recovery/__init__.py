"""Exact recovery of dequantized checkpoints, tested on simulated and real ones."""
