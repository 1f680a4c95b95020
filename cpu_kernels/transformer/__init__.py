"""Kernels of the forward pass."""
