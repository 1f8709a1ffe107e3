"""`python -m clla`."""

from clla.cli import main

main()
