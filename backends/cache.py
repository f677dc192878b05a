"""Where compiled things are kept between processes: whole and as they were written, or not at all.

An entry is a file and, beside it, what it was made from and its checksum. Both are written under another name first, so
that a process that is killed, or two that write the same entry, leave nothing half done. What does not fit its checksum
is made again.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import platformdirs

Make = Callable[[Path], None]


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
    path, note = folder / f"{name}{suffix}", folder / f"{name}.json"
    if _is_whole(path, note, key):
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix="unfinished-") as unfinished:
            made = Path(unfinished) / path.name
            make(made)
            text = json.dumps({"key": key, "sha256": _checksum(made)})
            (Path(unfinished) / note.name).write_text(text, encoding="utf-8")
            os.replace(made, path)
            os.replace(Path(unfinished) / note.name, note)
    except OSError as error:
        warnings.warn(f"nothing is cached: {error}; set TTTC_CACHE_DIR to a folder that is writable", stacklevel=2)
        return None
    return path


def _is_whole(path: Path, note: Path, key: str) -> bool:
    try:
        known = json.loads(note.read_text(encoding="utf-8"))
        return bool(known == {"key": key, "sha256": _checksum(path)})
    except (OSError, ValueError):
        return False


def _checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
