"""llama.cpp beside us: its programs, and a library that computes what ours does."""
