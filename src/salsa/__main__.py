"""`python -m salsa` is `salsa`."""

from salsa.cli import main

main()
