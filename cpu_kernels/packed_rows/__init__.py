"""Packed rows: layout, packing, unpacking and validation."""
