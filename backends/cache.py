"""Where compiled things are kept between processes: whole and as they were written, or not at all.

An entry is a note, which says what it was made from, and a file beside it, with its checksum. Both are written under
another name first, the note last, so that a process that is killed, or two that write the same entry, leave nothing
half done. What does not fit its checksum is made again. What the file is called follows from the key and the checksum:
no note leads anywhere else. The folder is the user's alone (`folders.py`).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import platformdirs

from tttc.backends.folders import foreign, private

Make = Callable[[Path], object]
UNFINISHED = "unfinished-"
DAY = 24 * 3600.0
CACHE_VARIABLE = "TTTC_CACHE_DIR"


def cache_dir() -> Path:
    """The folder of compiled and tuned things: `TTTC_CACHE_DIR`, or the user's cache folder."""
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen).expanduser() if chosen else platformdirs.user_cache_path("tttc")


def cached(kind: str, key: str, suffix: str, make: Make) -> Path | None:
    """The file that `make` writes for this key, made only where the cache does not have it.

    None, with a warning, where the cache cannot be written.
    """
    name = hashlib.sha256(key.encode()).hexdigest()[:32]
    try:
        folder = private(private(cache_dir(), CACHE_VARIABLE) / kind, CACHE_VARIABLE)
        note = folder / f"{name}.json"
        if path := _whole(note, key, suffix):
            return path
        _sweep(folder)
        with tempfile.TemporaryDirectory(dir=folder, prefix=UNFINISHED) as unfinished:
            made = Path(unfinished) / f"{name}{suffix}"
            make(made)
            checksum = _checksum(made)
            path = _file_of(note, checksum, suffix)
            text = json.dumps({"key": key, "file": path.name, "sha256": checksum})
            (Path(unfinished) / note.name).write_text(text, encoding="utf-8")
            os.replace(made, path)
            os.replace(Path(unfinished) / note.name, note)
    except OSError as error:
        warnings.warn(f"nothing is cached: {error}; set {CACHE_VARIABLE} to a folder that is writable", stacklevel=2)
        return None
    return path


def _whole(note: Path, key: str, suffix: str) -> Path | None:
    """The file of an entry, if it is as it was written, for this key, and a file of the user's own."""
    try:
        known = json.loads(note.read_text(encoding="utf-8"))
        path = _file_of(note, known["sha256"], suffix)
        if (known["key"], known["file"]) != (key, path.name) or path.is_symlink() or not path.is_file():
            return None
        return path if foreign(path) is None and known["sha256"] == _checksum(path) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _file_of(note: Path, checksum: str, suffix: str) -> Path:
    """The file beside a note."""
    return note.with_name(f"{note.stem}-{checksum[:8]}{suffix}")


def _sweep(folder: Path) -> None:
    """Remove what processes that were killed a day ago and before have left."""
    for left in folder.glob(f"{UNFINISHED}*"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > DAY:
                shutil.rmtree(left)


def _checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
