"""Names: a variable that the compiler derives is never called as a user may call one of theirs.

A user's name is a Python identifier, any one. What is derived from it holds a mark that no identifier has, so that a
dictionary keyed by names tells all variables apart, whatever they are called:

    W'start   S.W   d:W   d:S.W        the start of W, the sum of W, a cotangent       W_start, S_W, dW, dS_W
    :z   :loss   :x1   :C              what belongs to no declared name                z, loss, x1, C
    W@gate                             one that shares its name with another           W
    #D   lambda()                      in a text: the size of D, a function            D, lambda

A text is written with its names in brackets (`marked`). When it is whole, `worded` gives each one a word: as it is said
above on the right, with `_` behind it until nothing else in that function is called so. What else there is, the text
itself says: no list of such words is kept.
"""

from __future__ import annotations

import keyword
import re
import unicodedata
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import NamedTuple

_OPEN, _CLOSE = "⟨", "⟩"
_MARKED = re.compile(f"{_OPEN}([^{_CLOSE}]*){_CLOSE}")
_WORD = re.compile(r"(?<![\w.])[^\W\d]\w*")  # what comes after a point is no variable
_HEAD = re.compile(f"def (?:{_OPEN}([^{_CLOSE}]*){_CLOSE}|\\w+)")
_ASIDE = re.compile(r'"""[\s\S]*?"""|\'\'\'[\s\S]*?\'\'\'|"(?:[^"\\\n]|\\.)*"|#[^\n]*')


# -- what is derived ---------------------------------------------------------------------------------------------------


def own(word: str) -> str:
    """A name that belongs to the compiler alone: own("z") is spelled z."""
    return f":{word}"


def prefixed(prefix: str, name: str) -> str:
    """prefixed("S", "W") is spelled S_W."""
    return f"{prefix}.{name}"


def suffixed(name: str, suffix: str) -> str:
    """suffixed("W", "start") is spelled W_start."""
    return f"{name}'{suffix}"


def numbered(name: str, i: int) -> str:
    """numbered("D", 1) is spelled D1."""
    return f"{name}:{i}"


def differential(name: str) -> str:
    """The gradient or the cotangent of a variable: differential("W") is spelled dW."""
    return f"d:{name}"


def differentiated(name: str) -> str:
    """The variable of which this is the gradient."""
    return name.removeprefix("d:")


def apart(name: str, role: str) -> str:
    """A declared name that another role has as well; it is spelled as declared."""
    return f"{name}@{role}"


def as_declared(name: str) -> str:
    """What the user calls a declared variable."""
    return name.partition("@")[0]


def size_of(dim: str) -> str:
    """In a text: the size of a dim, which a variable may be called as well."""
    return f"#{dim}"


def places_of(dim: str) -> str:
    """In a text: the places along a dim; places_of("D") is spelled d."""
    return f"^{dim}"


def function(name: str) -> str:
    """In a text: a function, which a variable may be called as well."""
    return f"{name}()"


def inner(word: str) -> str:
    """In a text: a variable that hides nothing outside of the comprehension that it is of."""
    return f"~{word}"


def is_declared(name: str) -> bool:
    """Whether a user may have given it."""
    return as_declared(name).isidentifier()


@lru_cache(4096)
def spelled(name: str) -> str:
    """What a name reads like, where nothing else is called so."""
    if name.isidentifier():
        return name
    if name.startswith("^"):
        return spelled(name[1:]).lower()
    name = re.sub(r"@\w+", "", name)
    return re.sub(r"[:#~()]", "", name).replace(".", "_").replace("'", "_")


# -- one text ----------------------------------------------------------------------------------------------------------


def marked(name: str) -> str:
    """A name in a text that is not yet whole."""
    return f"{_OPEN}{name}{_CLOSE}"


def renamed(text: str, change: Callable[[str], str]) -> str:
    """A text with other names."""
    return _MARKED.sub(lambda m: marked(change(m[1])), text)


def unmarked(text: str) -> str:
    """A text with its names as they read, for one that is only looked at, or measured."""
    return _MARKED.sub(lambda m: spelled(m[1]), text)


class Wording(NamedTuple):
    """A whole text, and its words: of sizes and functions, and of the variables of each function."""

    text: str
    called: Mapping[str, str]
    variables: Mapping[str, Mapping[str, str]]


def worded(text: str) -> Wording:
    """A Python text with a word for each name: unlike the others of its function, and unlike what that says beside.

    Sizes and functions have one word in the whole text. Among variables the declared ones come first.
    """
    called = _chosen(text, _is_global)
    parts, variables = [], {}
    for part in _functions(text):
        words = _chosen(_replaced(part, called), lambda name: not _is_global(name))
        parts.append(_replaced(part, {**called, **words}))
        if (head := _HEAD.search(part)) is not None:
            variables[head[1]] = words
    return Wording("".join(parts), called, variables)


def _is_global(name: str) -> bool:
    return name.startswith("#") or name.endswith("()")


def _functions(text: str) -> list[str]:
    """The text, cut before each function, class and headline."""
    parts = [""]
    for line in text.splitlines(keepends=True):
        begins = line.startswith(("@", "class ", "# --")) or (line.startswith("def ") and not parts[-1].startswith("@"))
        if begins or (line.startswith("def ") and "\ndef " in parts[-1]):
            parts.append("")
        parts[-1] += line
    return parts


def _chosen(text: str, which: Callable[[str], bool]) -> dict[str, str]:
    """Words for some of the names of a text."""
    code = _ASIDE.sub("", text)
    taken = {*keyword.kwlist, *_WORD.findall(_MARKED.sub(" ", _HEAD.sub(" ", code)))}
    written = set(_MARKED.findall(code))  # what a comment alone says meets no variable, only the other names
    found: dict[str, str] = {}
    for name in sorted(filter(which, dict.fromkeys(_MARKED.findall(text))), key=_rank):
        word = unicodedata.normalize("NFKC", spelled(name))  # as Python reads it
        others = taken if name in written else {*found.values()}
        while word in others and not name.startswith("~"):
            word += "_"
        taken.add(word)
        found[name] = word
    return found


def _replaced(text: str, called: Mapping[str, str]) -> str:
    return _MARKED.sub(lambda m: called.get(m[1], m[0]), text)


def _rank(name: str) -> int:
    kinds = (name.startswith("#"), name.endswith("()"), is_declared(name))
    return next((i for i, fits in enumerate(kinds) if fits), len(kinds))


Word = Callable[[str], str]
"""How a text writes a name: `spelled`, or `marked` where it is to be `worded`."""
