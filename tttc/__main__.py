"""The command `tttc`, which `python -m tttc` is as well. Its version it says without what takes seconds to import."""

import sys
from importlib import import_module

from tttc.version import __version__


def main() -> None:
    """Run the command line: `tttc/cli/main.py`."""
    if sys.argv[1:] == ["--version"]:
        print(f"tttc {__version__}")
    else:
        import_module("tttc.cli.main").app(prog_name="tttc")


if __name__ == "__main__":
    main()
