"""The command `vitnas`, also as `python -m nas.cli`."""

import sys

from nas.cli import LONG


def start() -> None:
    """Run the command line, those verbs that train in huge pages."""
    if any(verb in LONG for verb in sys.argv[1:2]):
        from nas.process import start_again_in_huge_pages

        start_again_in_huge_pages()
    from nas.cli.app import main

    main()


if __name__ == "__main__":
    start()
