"""Run the `glimmer` command: the script, and `python -m server.cli`."""

import sys
from typing import NoReturn


def main() -> NoReturn:
    """Run the command; a library that is missing from the installation is one line, too."""
    try:
        from server.cli.commands import main as run
    except ImportError as error:
        print(f"glimmer: {error.name or error} cannot be imported; reinstall glimmer", file=sys.stderr)
        sys.exit(2)
    run()


if __name__ == "__main__":
    main()
