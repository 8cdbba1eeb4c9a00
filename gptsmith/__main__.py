"""`python -m gptsmith` is `gptsmith`: both begin here, where Ctrl-C leaves no traceback."""

import sys


def main() -> int:
    """Run the command line of this process; return its exit status."""
    try:
        from .cli.main import main as run_command

        return run_command()
    except KeyboardInterrupt:  # while the command line was imported
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
