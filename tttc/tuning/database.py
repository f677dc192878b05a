"""Results of tuning on disk: one JSON file that can be shared and merged, and those that come with the package.

    {"format": 1, "entries": [{"key": {...}, "choice": {...}, "seconds": ..., ...}, ...]}

It is `tuned.json` in the user's data folder, or in `TTTC_CACHE_DIR` where that is set. It is written under another name
and then put in place, by one process at a time. A file that cannot be read as one is set aside with a warning.
"""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import platformdirs

from tttc.errors import TuningError
from tttc.tuning.records import Entry

FORMAT = 1
SHIPPED = Path(__file__).parent / "tuned"


class _Newer(ValueError):
    """A file of a later version of tttc."""


def database_path() -> Path:
    """Where the results of this user are."""
    chosen = os.environ.get("TTTC_CACHE_DIR")
    folder = Path(chosen).expanduser() if chosen else platformdirs.user_data_path("tttc")
    return folder / "tuned.json"


def entries() -> tuple[tuple[Entry, ...], tuple[Entry, ...]]:
    """The user's entries, and those that come with the package; a file is read again only when it has changed."""
    return own_entries(), _shipped()


def own_entries(path: Path | None = None) -> tuple[Entry, ...]:
    """The entries of a database; none where there is none, or where it had to be set aside."""
    path = path or database_path()
    try:
        found = path.stat()
    except OSError:
        return ()
    stamp = (found.st_mtime_ns, found.st_size, found.st_ino)
    known = _read.get(path)
    if known is None or known[0] != stamp:
        known = _read[path] = (stamp, _entries_or_none(path))
    return known[1]


_read: dict[Path, tuple[tuple[int, ...], tuple[Entry, ...]]] = {}


@cache
def _shipped() -> tuple[Entry, ...]:
    return tuple(e for path in sorted(SHIPPED.glob("*.json")) for e in parsed(path.read_text(encoding="utf-8")))


def parsed(text: str) -> tuple[Entry, ...]:
    """The entries of a file; raises ValueError where it is none."""
    found = json.loads(text)
    if not isinstance(found, dict) or not isinstance(found.get("entries"), list):
        raise ValueError("it has no entries")
    if found.get("format") != FORMAT:
        kind = _Newer if isinstance(found.get("format"), int) and found["format"] > FORMAT else ValueError
        raise kind(f"its format is {found.get('format')!r}, this version reads {FORMAT}")
    return tuple(map(Entry.from_json, found["entries"]))


def written(found: Iterable[Entry]) -> str:
    """Entries as the text of a file."""
    return json.dumps({"format": FORMAT, "entries": [e.as_json() for e in found]}, indent=1) + "\n"


def _entries_or_none(path: Path) -> tuple[Entry, ...]:
    """The entries of a file; one that holds none is put out of the way, so that a new one can be begun."""
    try:
        return parsed(path.read_text(encoding="utf-8"))
    except (_Newer, OSError) as error:
        warnings.warn(f"tuning results in {path} are not used: {error}", stacklevel=4)
    except ValueError:
        try:
            with _alone(path):
                return _entries_or_aside(path)
        except OSError as error:
            warnings.warn(f"tuning results in {path} cannot be read, nor moved: {error}", stacklevel=4)
    return ()


def _entries_or_aside(path: Path) -> tuple[Entry, ...]:
    """The same while no other process writes, which may have mended the file in the meantime."""
    try:
        return parsed(path.read_text(encoding="utf-8"))
    except ValueError as error:
        aside = path.with_name(f"{path.name}.corrupt")
        os.replace(path, aside)
        warnings.warn(f"tuning results in {path} cannot be read ({error}); the file is now {aside}", stacklevel=5)
    return ()


# -- merging -----------------------------------------------------------------------------------------------------------


def merged(old: Sequence[Entry], new: Sequence[Entry], *, replace: bool = False) -> list[Entry]:
    """Both, with one entry for each key: the faster one for a token of one head, or with `replace` the new one. What
    was measured stays before an estimate, and of two estimates the later one.
    """
    found = {_identity(e): e for e in old}
    for e in new:
        known = found.get(_identity(e))
        if known is None or _instead(e, known, replace):
            found[_identity(e)] = e
    return list(found.values())


def _instead(new: Entry, known: Entry, replace: bool) -> bool:
    """Whether a new entry takes the place of one of the same key."""
    if new.static != known.static:
        return known.static
    return replace or (new.tuned > known.tuned if new.static else new.per_token < known.per_token)


def _identity(entry: Entry) -> str:
    return json.dumps(entry.as_json()["key"], sort_keys=True)


def add(new: Sequence[Entry], *, replace: bool = False, path: Path | None = None) -> Path:
    """Merge entries into the database, which is read and written while no other process does so.

    Raises `TuningError` where it cannot be written, or belongs to a later version.
    """
    path = path or database_path()
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _alone(path):
            text = written(merged(_present(path), new, replace=replace))
            _put(text, path)
    except OSError as error:
        raise TuningError(
            f"the results of tuning cannot be written to {path}: {error.strerror}.\n"
            "  Set TTTC_CACHE_DIR to a folder that is writable."
        ) from error
    return path


def _present(path: Path) -> Sequence[Entry]:
    if not path.exists():
        return ()
    try:
        return parsed(path.read_text(encoding="utf-8"))
    except _Newer as error:
        raise TuningError(
            f"{path} is of a later version of tttc: {error}.\n  Install that version, or move the file away."
        ) from error
    except ValueError:
        return _entries_or_aside(path)


def _put(text: str, path: Path) -> None:
    """The whole text or nothing, whenever the process ends."""
    handle, unfinished = tempfile.mkstemp(dir=path.parent, prefix=f"{path.name}.unfinished-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        os.unlink(unfinished)
        raise


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Keep other processes out, where the system has locks on files."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with path.with_name(f"{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


# -- files of the user -------------------------------------------------------------------------------------------------


def export_to(target: Path) -> int:
    """Write all entries of this user to a file; returns how many there are."""
    found = own_entries()
    try:
        target.write_text(written(found), encoding="utf-8")
    except OSError as error:
        raise TuningError(f"cannot write {target}: {error.strerror}.") from error
    return len(found)


def import_from(source: Path) -> int:
    """Merge the entries of a file into those of this user; returns how many the file has."""
    try:
        found: Any = parsed(source.read_text(encoding="utf-8"))
    except OSError as error:
        raise TuningError(f"cannot read {source}: {error.strerror}.") from error
    except ValueError as error:
        raise TuningError(
            f"{source} holds no results of tuning: {error}.\n  Give a file that `tttc tune --export` wrote."
        ) from error
    add(found)
    return len(found)
