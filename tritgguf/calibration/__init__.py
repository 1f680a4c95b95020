"""Calibration: encoders that run the source model on a text. Needs torch."""
