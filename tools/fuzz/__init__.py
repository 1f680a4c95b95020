"""Damaged input by the thousand."""
