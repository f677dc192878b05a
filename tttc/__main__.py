"""`python -m tttc` is the command `tttc`."""

from tttc.cli.main import main

if __name__ == "__main__":
    main()
