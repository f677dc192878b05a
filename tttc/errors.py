"""Every error that `tttc` raises on purpose, in one catalogue.

Each message names the variant and the role, shows the user's own line with a caret, both values, and the way out.
"""

from __future__ import annotations

import linecache
import os
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import NamedTuple

_PACKAGE = os.path.realpath(Path(__file__).parent)
_OWN_FOLDERS = tuple(os.path.join(os.path.realpath(Path(_PACKAGE) / folder), "") for folder in (".", "ir", "backends"))
_LIBRARIES = tuple(os.path.join(os.path.realpath(sysconfig.get_path(p)), "") for p in ("stdlib", "purelib", "platlib"))


class TTTCError(Exception):
    """Base of all errors raised by `tttc`."""


class DeclarationError(TTTCError):
    """A declaration that has no meaning; lists every problem found, not only the first."""


class ShapeError(TTTCError, ValueError):
    """Two shapes that do not fit: in a declaration, or between a declaration and a call."""


class NotDifferentiable(DeclarationError):
    """A loss through which no gradient to any fast weight exists."""


class NotDualizable(DeclarationError):
    """An update or a read point that has no exact chunked form."""


class BackendRefusal(TTTCError):
    """A backend that was asked for by name and cannot run this program."""


class FallbackWarning(UserWarning):
    """Native kernels that `backend="auto"` did not take, and why."""


class StateMismatch(TTTCError, ValueError):
    """A state that does not continue where this call begins."""


class FileRefused(TTTCError, ValueError):
    """A file that is damaged, of another kind, version or declaration; nothing of it is used."""


class PoolError(TTTCError, ValueError):
    """Slots of a pool that it does not have, that nobody was given, or more than are free."""


class NonFinite(TTTCError, ValueError):
    """A NaN or an infinity in an input, found with `check=True`."""


class TuningError(TTTCError):
    """A device, a budget or a file that cannot be tuned for, with or to; or nothing that computes what it should."""


class PassChangedMeaning(TTTCError):
    """Internal: a stage whose program no longer computes what the stage before it computed."""


@dataclass(frozen=True)
class SourceLine:
    """A place in the user's file; `start` and `end` are the columns that the caret underlines."""

    file: str
    line: int
    start: int = 0
    end: int = 0

    @property
    def text(self) -> str:
        return linecache.getline(self.file, self.line).rstrip("\n")

    def __str__(self) -> str:
        return f"{_shown_path(self.file)}:{self.line}"

    def shown(self) -> str:
        """The line with its place to the right and a caret below."""
        text = self.text
        if not text.strip():
            return f"    {self}"
        indent = len(text) - len(text.lstrip())
        start, end = (self.start, self.end) if self.end > self.start else (indent, len(text))
        caret = " " * (start - indent) + "^" * max(1, min(end, len(text)) - start)
        return f"    {text.strip()}    ({self})\n    {caret}"


@dataclass(frozen=True)
class Problem:
    """One reason why a declaration is refused: what is wrong, where, and what to write instead."""

    what: str
    remedy: str
    where: SourceLine | None = None
    inexact: bool = False
    """The declaration has a meaning, but no exact form over a chunk of tokens."""

    def __str__(self) -> str:
        place = f"\n{self.where.shown()}" if self.where else ""
        return f"{self.what}{place}\n  {self.remedy}"


def refusal(variant: str, problems: Sequence[Problem]) -> DeclarationError:
    """The error that holds all problems of one declaration."""
    kind = NotDualizable if all(p.inexact for p in problems) else DeclarationError
    return kind(problems_text(variant, problems))


def problems_text(variant: str, problems: Sequence[Problem]) -> str:
    """All problems of one declaration as one message."""
    if len(problems) == 1:
        return f"variant `{variant}`: {problems[0]}"
    listed = "\n\n".join(f"{i}. {p}" for i, p in enumerate(problems, 1))
    return f"variant `{variant}` has {len(problems)} problems:\n\n{listed}"


class Place(NamedTuple):
    """A point in a running function; the line and its columns are found when they are asked for."""

    code: CodeType
    instruction: int
    number: int

    @property
    def line(self) -> SourceLine:
        first, last, start, end = _positions(self.code, self.instruction)
        file = self.code.co_filename
        if first is None or first != last:
            return SourceLine(file, self.number)
        return SourceLine(file, first, _column(self.code, first, start), _column(self.code, first, end))


def users_place() -> Place | None:
    """The innermost place on the stack that is neither part of `tttc` nor, between it and the user, of a library."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and _is_own(frame.f_code.co_filename):
        frame = frame.f_back
    innermost = frame
    while frame is not None and not _is_own(frame.f_code.co_filename):
        if not _is_library(frame.f_code.co_filename):
            return Place(frame.f_code, frame.f_lasti, frame.f_lineno)
        frame = frame.f_back
    return None if innermost is None else Place(innermost.f_code, innermost.f_lasti, innermost.f_lineno)


def declared_at() -> SourceLine:
    """The line that called what calls this: of a declaration, where it stands."""
    frame = sys._getframe(2)
    return SourceLine(frame.f_code.co_filename, frame.f_lineno)


def users_line() -> SourceLine | None:
    """The innermost line on the stack that is not part of `tttc`, with the columns of the running expression."""
    place = users_place()
    return None if place is None else place.line


def users_level() -> int:
    """How far above the caller that line is: the `stacklevel` of a warning about it, less one."""
    frame, level = sys._getframe(1), 0
    while frame.f_back is not None and _is_own(frame.f_code.co_filename):
        frame, level = frame.f_back, level + 1
    return level


def raised_at(error: BaseException) -> SourceLine | None:
    """The user's line that an error comes from: neither one of `tttc` nor, where that can be told, of a library."""
    places, trace = [], error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if not _is_own(code.co_filename):
            places.append(Place(code, trace.tb_lasti, trace.tb_lineno))
        trace = trace.tb_next
    mine = [p for p in places if not _is_library(p.code.co_filename)]
    return (mine or places)[-1].line if places else None


@cache
def _is_own(file: str) -> bool:
    path = os.path.realpath(file)
    return path.startswith(_OWN_FOLDERS) and os.path.basename(path) != "library.py"


@cache
def _is_library(file: str) -> bool:
    return os.path.realpath(file).startswith(_LIBRARIES)


def _positions(code: CodeType, lasti: int) -> tuple[int | None, int | None, int | None, int | None]:
    for index, position in enumerate(code.co_positions()):
        if index == lasti // 2:
            return position
    return None, None, None, None


def _column(code: CodeType, line: int, offset: int | None) -> int:
    """Columns are byte offsets in the source encoding; the caret needs characters."""
    text = linecache.getline(code.co_filename, line).encode()
    return len(text[: offset or 0].decode(errors="ignore"))


def _shown_path(file: str) -> str:
    relative = os.path.relpath(file)
    return file if relative.startswith("..") else relative
