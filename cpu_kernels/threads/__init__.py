"""Threads that run kernels side by side."""
