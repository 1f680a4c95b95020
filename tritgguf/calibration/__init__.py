"""Encoders that let a text go through the source model; needs torch."""
