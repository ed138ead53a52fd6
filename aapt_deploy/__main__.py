"""The entry point of `aapt` and of `python -m aapt_deploy`. Importing the command line takes a moment, in which Ctrl-C is already an answer."""

import sys


def main() -> None:
    """Run the command line."""
    try:
        from aapt_deploy import cli

        cli.main()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
