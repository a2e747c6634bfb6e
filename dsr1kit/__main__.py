"""`python -m dsr1kit`."""

from dsr1kit.cli import main

main()
