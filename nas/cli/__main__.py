"""The command `vitnas`, also as `python -m nas.cli`."""

import sys

from nas.process import start_again_in_huge_pages

TRAINS = ("search", "prune", "train")


def start() -> None:
    """Run the command line, those verbs that train in huge pages."""
    if sys.argv[1:2] and sys.argv[1] in TRAINS:
        start_again_in_huge_pages()
    from nas.cli.app import main

    main()


if __name__ == "__main__":
    start()
