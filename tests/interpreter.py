"""Triton's interpreter without its long way to the first line: it looks through all of Triton's language whenever a
function is called, a fifth of the time of these tests, and finds the same names every time.
"""

from __future__ import annotations

import inspect
from typing import Any


def quicken() -> None:
    """What of a module of the language the interpreter replaces is looked for once."""
    from triton.language.core import is_builtin
    from triton.runtime import interpreter

    names: dict[Any, list[str]] = {}

    def patch_builtin(package: Any, builder: Any, scope: Any) -> None:
        if package not in names:
            names[package] = [name for name, member in inspect.getmembers(package) if is_builtin(member)]
        for name in names[package]:
            member = getattr(package, name)
            if is_builtin(member):  # not where a function that is running has replaced it already
                interpreter._patch_attr(package, name, member, builder, scope)

    assert callable(interpreter._patch_builtin)
    interpreter._patch_builtin = patch_builtin
