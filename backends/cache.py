"""Where compiled things are kept between processes: whole and as they were written, or not at all.

An entry is a note, which says what it was made from, and the file that the note names, with its checksum. Both are
written under another name first, the note last, so that a process that is killed, or two that write the same entry,
leave nothing half done. What does not fit its checksum is made again.
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

Make = Callable[[Path], object]
UNFINISHED = "unfinished-"
DAY = 24 * 3600.0


def cache_dir() -> Path:
    """The folder of compiled and tuned things: `TTTC_CACHE_DIR`, or the user's cache folder."""
    chosen = os.environ.get("TTTC_CACHE_DIR")
    return Path(chosen).expanduser() if chosen else platformdirs.user_cache_path("tttc")


def cached(kind: str, key: str, suffix: str, make: Make) -> Path | None:
    """The file that `make` writes for this key, made only where the cache does not have it.

    None, with a warning, where the cache cannot be written.
    """
    folder = cache_dir() / kind
    name = hashlib.sha256(key.encode()).hexdigest()[:32]
    note = folder / f"{name}.json"
    if path := _whole(note, key):
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        with tempfile.TemporaryDirectory(dir=folder, prefix=UNFINISHED) as unfinished:
            made = Path(unfinished) / f"{name}{suffix}"
            make(made)
            checksum = _checksum(made)
            path = folder / f"{name}-{checksum[:8]}{suffix}"
            text = json.dumps({"key": key, "file": path.name, "sha256": checksum})
            (Path(unfinished) / note.name).write_text(text, encoding="utf-8")
            os.replace(made, path)
            os.replace(Path(unfinished) / note.name, note)
    except OSError as error:
        warnings.warn(f"nothing is cached: {error}; set TTTC_CACHE_DIR to a folder that is writable", stacklevel=2)
        return None
    return path


def _whole(note: Path, key: str) -> Path | None:
    """The file of an entry, if it is as it was written, and for this key."""
    try:
        known = json.loads(note.read_text(encoding="utf-8"))
        path = note.parent / known["file"]
        return path if known["key"] == key and known["sha256"] == _checksum(path) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _sweep(folder: Path) -> None:
    """Remove what processes that were killed a day ago and before have left."""
    for left in folder.glob(f"{UNFINISHED}*"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > DAY:
                shutil.rmtree(left)


def _checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
