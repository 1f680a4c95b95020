"""Numba kernels of the trit codec and of the transformer's forward pass: arrays in, arrays out.

Nothing here knows a file or a model. `docs/format.md` specifies the packed rows that the kernels work on.
"""

from cpu_kernels import kernel_cache

kernel_cache.install()
