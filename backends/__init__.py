"""Backends: from a scheduled program to something that runs. README.md says how to add one."""

if __name__ != "tttc.backends":
    raise ImportError("import this package as tttc.backends")
