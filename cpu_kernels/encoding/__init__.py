"""Kernels of the encoders: search of scales, error feedback, exact recovery."""
