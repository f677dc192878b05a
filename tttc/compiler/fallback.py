"""What `backend="auto"` did not take, said once where the user sees it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

from tttc.declare.variant import Signature, Variant
from tttc.errors import FallbackWarning, users_level

_said: set[tuple[type[Variant] | None, str]] = set()
_silent: ContextVar[bool] = ContextVar("silent", default=False)


def warn_of_fallback(declared: Signature, taken: str, refused: Mapping[str, str], absent: Mapping[str, str]) -> None:
    """Warn of native backends that were not taken, with the reasons: once for each declaration and backend, and once
    in all for one that is `absent` from this machine.
    """
    found: dict[tuple[type[Variant] | None, str], str]
    found = {(declared.variant, name): why for name, why in refused.items()}
    found |= {(None, name): why for name, why in absent.items()}
    new = {key: why for key, why in found.items() if key not in _said}
    if not new or _silent.get():
        return
    _said.update(new)
    reasons = "; ".join(f"not {name}: {why}" for (_, name), why in new.items())
    warnings.warn(
        f'variant `{declared.name}`: backend="auto" takes {taken}, {reasons}.\n'
        f'  It is slower. This is said once; with backend="{taken}" it is not.',
        FallbackWarning,
        stacklevel=1 + users_level(),
    )


@contextmanager
def said_elsewhere() -> Iterator[None]:
    """Inside, nothing is warned of: for what says itself which backend was taken, and why."""
    token = _silent.set(True)
    try:
        yield
    finally:
        _silent.reset(token)
