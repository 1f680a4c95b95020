"""lm-evaluation-harness on trit files: its model, offline tasks, and the sandbox for generated code.

Only `registration`, `model` and `evaluate` import lm-eval, and nothing outside of this room imports them on start.
"""
