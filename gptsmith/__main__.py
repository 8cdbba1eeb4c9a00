"""`python -m gptsmith` is `gptsmith`: both begin here, where Ctrl-C leaves no traceback."""

import os
import sys


def main() -> int:
    """Run the command line of this process; return its exit status."""
    fill_closed_streams()
    try:
        from .cli.main import main as run_command

        return run_command()
    except KeyboardInterrupt:  # while the command line was imported
        print("interrupted", file=sys.stderr)
        return 130


def fill_closed_streams() -> None:
    """Open the null device in the place of each standard stream that is closed.

    The next file gets the lowest free number: a library that opens one when it is imported, or a
    socket, would get a stream's number, and what is written to it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


if __name__ == "__main__":
    sys.exit(main())
