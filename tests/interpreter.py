"""Triton's interpreter without its long ways: it computes the same, in half of the time.

It looks through all of Triton's language whenever a function is called, and finds the same names every time; it makes
the type and the shape of every value anew; and it looks for overflows of which it says nothing.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any


def quicken() -> None:
    """Let what the interpreter finds again and again be found once."""
    from triton.language import core
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    if not builder.options.debug:  # what is found of overflows is dropped
        builder.options = replace(builder.options, sanitize_overflow=False)
    _look_once(interpreter, core)
    _types_once(interpreter, core)


def _look_once(interpreter: Any, core: Any) -> None:
    """For what of a module of the language is replaced, and whether it is, while a kernel runs."""
    names: dict[Any, list[str]] = {}
    replaced: set[int] = set()
    found, put_back = interpreter._patch_lang, interpreter._LangPatchScope.restore

    def patch_builtin(package: Any, builder: Any, scope: Any) -> None:
        if package not in names:
            names[package] = [name for name, member in inspect.getmembers(package) if core.is_builtin(member)]
        for name in names[package]:
            member = getattr(package, name)
            if core.is_builtin(member):  # not where a function that is running has replaced it already
                interpreter._patch_attr(package, name, member, builder, scope)

    def patch_lang(function: Any) -> Any:
        names_of_module = id(function.__globals__)
        if names_of_module in replaced:  # by the kernel that calls this function
            return None
        replaced.add(names_of_module)
        return found(function)

    def restore(scope: Any) -> None:
        replaced.clear()
        put_back(scope)

    assert callable(interpreter._patch_builtin)
    interpreter._patch_builtin, interpreter._patch_lang = patch_builtin, patch_lang
    interpreter._LangPatchScope.restore = restore


def _types_once(interpreter: Any, core: Any) -> None:
    """The shape of each type, and how NumPy calls it."""
    found = interpreter._get_np_dtype
    dtypes: dict[tuple[type, str], Any] = {}
    shapes: dict[tuple[int, ...], tuple[Any, Any]] = {}
    blocks: dict[tuple[Any, ...], tuple[Any, Any, str]] = {}

    def get_np_dtype(dtype: Any) -> Any:
        key = type(dtype), dtype.name
        if key not in dtypes:
            dtypes[key] = found(dtype)
        return dtypes[key]

    def tensor(self: Any, handle: Any, type: Any, make: Any = core.tensor.__init__) -> None:
        shape = tuple(type.shape) if type.is_block() else ()
        if shape not in shapes:
            make(self, handle, type)
            shapes[shape] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shapes[shape]

    def block(self: Any, element_ty: Any, shape: Any, make: Any = core.block_type.__init__) -> None:
        key = element_ty.name, *(s.value if isinstance(s, core.constexpr) else s for s in shape)
        if key not in blocks:
            make(self, element_ty, shape)
            blocks[key] = self.shape, self.numel, self.name
        self.element_ty = element_ty
        self.shape, self.numel, self.name = blocks[key]

    interpreter._get_np_dtype, core.tensor.__init__, core.block_type.__init__ = get_np_dtype, tensor, block
