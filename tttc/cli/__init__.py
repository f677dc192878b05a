"""The command line: `tttc --help`."""
