"""Run the `glimmer` command: `python -m server.cli`."""

from server.cli.commands import main

main()
