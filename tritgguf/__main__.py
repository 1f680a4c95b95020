"""Lets `python -m tritgguf` do what `tritgguf` does."""

import sys

from tritgguf.cli import main

sys.exit(main())
