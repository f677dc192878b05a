"""Kernels compiled for few registers: with switches of LLVM, set in the process that compiles (see compile_process.py).

What it made is found in Triton's own cache, where a launch looks as well: the switches are part of what is asked for.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from tttc.backends.cost_model import NotCompiled
from tttc.backends.folders import private
from tttc.backends.notice import compiling
from tttc.backends.target import nvidia_target
from tttc.backends.triton.compile_process import CompileProcesses, Crashed, switches

Order = Mapping[str, Any]


TRITON_CACHE = "TRITON_CACHE_DIR"


def keep_cache_private() -> None:
    """Have Triton load kernels, and what launches them, from a folder of the user's own: another one, for this process,
    where the one that it would take is not.
    """
    import triton

    folder = Path(triton.knobs.cache.dir)
    try:
        own = private(folder, TRITON_CACHE)
    except OSError:
        return  # Triton says itself that it cannot write there
    if own != folder:
        os.environ[TRITON_CACHE] = str(own)


def compiled(order: Order, source: Any, target: Any, options: Mapping[str, Any]) -> Any:
    """What `triton.compile` makes of a source; `order` is the same as plain data, for a process of its own.

    Raises `Crashed` where that process ended with its compiler. Where it failed otherwise, Triton compiles here as it
    always does, and says what is wrong.
    """
    import triton
    from triton._C.libtriton import get_cache_invalidating_env_vars

    asked = get_cache_invalidating_env_vars() | switches(order["target"])
    if not _kept(source, target, options, asked):
        try:
            CompileProcesses().answer(order)
        except Crashed:
            raise
        except (NotCompiled, OSError):
            return triton.compile(source, target=target, options=options)
    return triton.compile(source, target=target, options=options, _env_vars=asked)


def _kept(source: Any, target: Any, options: Mapping[str, Any], asked: Mapping[str, str]) -> bool:
    """Whether Triton has it in its cache."""
    from triton.compiler.compiler import make_backend
    from triton.runtime.cache import get_cache_key, get_cache_manager

    backend = make_backend(target)
    key = get_cache_key(source, backend, backend.parse_options({**options, **source.parse_options()}), env_vars=asked)
    manager = get_cache_manager(hashlib.sha256(key.encode()).hexdigest())
    return bool(manager.get_group(f"{source.name}.json"))


def install_compile_hook(function: Any, title: str, about: Order) -> None:
    """Have a function of Triton's compiled so when it is launched. `title`: its declaration, for who waits at a
    terminal; `about`: its file, as in an order. The interpreter compiles none.
    """
    compile_and_keep = getattr(function, "_do_compile", None)
    if compile_and_keep is None:  # a release of Triton that does it in another way
        return

    def with_few_registers(*arguments: Any, **named: Any) -> Any:
        # each device for which it is launched first puts Triton's there
        function.compile = partial(_launched, title, about)
        return compile_and_keep(*arguments, **named)

    function._do_compile = with_few_registers


def _launched(title: str, about: Order, source: Any, target: Any, options: Mapping[str, Any], **named: Any) -> Any:
    """What a launch has compiled; as Triton does it, where the source has more to it than an order can say."""
    import triton

    order = order_of_source(about, source, target, options)
    asked = switches(order["target"]) if order is not None and not named else {}
    with _told(title, source, target, options, asked):
        if order is None or not asked:
            return triton.compile(source, target=target, options=options, **named)
        return compiled(order, source, target, options)


def _told(
    title: str, source: Any, target: Any, options: Mapping[str, Any], switched: Mapping[str, str]
) -> AbstractContextManager[None]:
    """A line on the terminal meanwhile, but where Triton only reads what it has."""
    from triton._C.libtriton import get_cache_invalidating_env_vars

    kept = _kept(source, target, options, get_cache_invalidating_env_vars() | switched)
    return nullcontext() if kept else compiling(title, "this GPU")


def order_of_source(about: Order, source: Any, target: Any, options: Mapping[str, Any]) -> Order | None:
    """What Triton was asked to compile, as plain data; None where it is not."""
    names = list(source.signature)
    constants = {names[i]: getattr(x, "name", x) for (i, *_), x in source.constants.items()}
    if not all(isinstance(x, bool | int | str | None) for x in constants.values()):
        return None
    return {
        **about,
        "signature": dict(source.signature),
        "constants": constants,
        "attributes": {names[i]: x for (i, *_), x in source.attrs.items()},
        "target": nvidia_target(target.arch).name if target.backend == "cuda" else str(target.arch),
        "options": {n: x for n, x in options.items() if isinstance(x, bool | int | float | str)},
    }
