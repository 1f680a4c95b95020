"""Numba kernels of the trit format and of the transformer's forward pass.

The kernels take and return arrays; they do not depend on files or models. `docs/format.md` specifies the packed rows.
"""
