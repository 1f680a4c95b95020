"""Fuzzing: damaged input for every reader."""
