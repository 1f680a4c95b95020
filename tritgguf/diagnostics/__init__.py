"""How fast a file runs here, and what this machine gives the kernels."""
