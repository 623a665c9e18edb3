"""Run `python -m grounded_sam` as the command `grounded-sam`."""

from grounded_sam.cli.main import main

main()
