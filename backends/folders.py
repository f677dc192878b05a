"""Folders from which kernels are loaded: of the user alone, or a temporary one in their place.

Whoever can write into such a folder, or has made it, decides what this process runs. So one that is not there is made
with the rights 0700, and one that belongs to someone else or that others can write to is not used: a warning says so
once, and how to mend it.
"""

from __future__ import annotations

import atexit
import os
import shutil
import stat
import tempfile
import warnings
from functools import cache
from pathlib import Path

OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
ROOT = 0  # can change everything anyway


def private(folder: Path, variable: str) -> Path:
    """The folder, made where it is not there; or a temporary one of this process, where others have a hand in it.

    `variable` is that of the environment by which the user can name another. Raises `OSError` where it cannot be made.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    reason = exposed(folder)
    return folder if reason is None else _instead(folder, reason, variable)


def exposed(path: Path) -> str | None:
    """How others have a hand in a folder; None where they have not, or where there are no such rights."""
    if reason := foreign(path) or foreign(path.resolve()):  # who makes a link decides where it leads
        return reason
    target = path.stat()
    if os.name == "posix" and target.st_mode & OTHERS_WRITE:
        return f"can be written to by others (its rights are {stat.S_IMODE(target.st_mode):04o})"
    return None


def foreign(path: Path) -> str | None:
    """Whose a folder, a file or a link is, where it is not the user's own."""
    owner = path.lstat().st_uid
    return None if os.name != "posix" or owner in (os.geteuid(), ROOT) else f"belongs to the user {owner}"


@cache
def _instead(folder: Path, reason: str, variable: str) -> Path:
    """An empty folder that is removed when the process ends; the same one every time."""
    mend = f"set {variable} to a folder of yours"
    if "written" in reason:
        mend = f"remove it, or where all that is in it is yours, chmod 700 {folder}"
    warnings.warn(
        f"{folder} {reason}: no kernels are loaded from it, nor kept beyond this process; {mend}", stacklevel=5
    )
    made = tempfile.mkdtemp(prefix="tttc-")  # of the user alone
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return Path(made)
