"""Packed rows: their layout, packing and unpacking."""
