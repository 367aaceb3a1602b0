"""`python -m nas.cli`: the command `vitnas`."""

from nas.cli.app import main

main()
