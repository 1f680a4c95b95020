"""How kernels become machine code, are kept on disk, and are called without Numba."""
