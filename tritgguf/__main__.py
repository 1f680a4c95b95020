"""Entry point of `tritgguf` and `python -m tritgguf`."""

import contextlib
import os
import sys


def main() -> int:
    """Run the command line (`tritgguf.cli.app.main`) and return its exit code; Ctrl-C ends it without a traceback."""
    try:
        _replace_closed_streams()
        from tritgguf.cli import app

        return app.main()
    except KeyboardInterrupt:
        return 130
    finally:
        # If Ctrl-C interrupts the exec of a string (defining a dataclass runs one), CPython sets a flag, and `-m` then
        # kills itself with SIGINT whatever the exit code. The next exec of a string clears the flag.
        exec("")


def _replace_closed_streams() -> None:
    """Open the null device for standard streams that are closed, as services and cron may leave them.

    Otherwise the next file that is opened gets the number of such a stream, and whatever a library or a child process
    prints goes into it. `sys.stdin` stays None, so that commands can tell that there is no prompt to wait for.
    """
    for number, stream in enumerate((sys.stdin, sys.stdout, sys.stderr)):
        if stream is not None:
            continue
        with contextlib.suppress(OSError):
            opened = os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(opened, opened == number)
            if number > 0:
                name = ("stdin", "stdout", "stderr")[number]
                setattr(sys, name, os.fdopen(opened, "w", encoding="utf-8", errors="replace"))


if __name__ == "__main__":
    sys.exit(main())
