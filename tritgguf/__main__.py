"""Entry point of `tritgguf` and `python -m tritgguf`."""

import sys


def main() -> int:
    """Run the command line (`tritgguf.cli.app.main`) and return its exit code; Ctrl-C ends it without a traceback."""
    try:
        from tritgguf.cli import app

        return app.main()
    except KeyboardInterrupt:
        return 130
    finally:
        # If Ctrl-C interrupts the exec of a string (defining a dataclass runs one), CPython sets a flag, and `-m` then
        # kills itself with SIGINT whatever the exit code. The next exec of a string clears the flag.
        exec("")


if __name__ == "__main__":
    sys.exit(main())
