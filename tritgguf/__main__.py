"""Where the program begins: `tritgguf` and `python -m tritgguf`."""

import sys


def main() -> int:
    """Run the command line (`tritgguf.cli.main`) and return its exit code; Ctrl-C is quiet during its imports too."""
    try:
        from tritgguf.cli import app

        return app.main()
    except KeyboardInterrupt:
        return 130
    finally:
        # CPython remembers a Ctrl-C that came inside the exec of a string, which importing a dataclass is, and under
        # `-m` it would kill itself with SIGINT whatever we return; at its next exec of a string it forgets.
        exec("")


if __name__ == "__main__":
    sys.exit(main())
