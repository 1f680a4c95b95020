"""Speed of the kernels, alone and compared with llama.cpp."""
