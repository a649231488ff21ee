"""The `ldm` command as `python -m ldm`."""

from ldm.cli import main

main()
