"""`python -m ldm`: the same as the `ldm` command."""

from ldm.cli import main

main()
