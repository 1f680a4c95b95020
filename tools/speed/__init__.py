"""How fast the kernels are, alone and beside llama.cpp."""
