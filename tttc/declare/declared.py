"""What is common to everything that a class body declares: it is a name for a tensor of the call, and no value yet."""

from __future__ import annotations

from typing import Any, NoReturn

from tttc.errors import DeclarationError, users_line


class Declared:
    """A state, param, token or gate, as it stands in the class body."""

    @property
    def kind(self) -> str:
        return type(self).__name__.removesuffix("Spec").lower()

    def _no_value(self, *others: Any) -> NoReturn:
        raise no_value(self)

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _no_value
    __pow__ = __rpow__ = __matmul__ = __rmatmul__ = __neg__ = __pos__ = __abs__ = __mod__ = __rmod__ = _no_value
    __lt__ = __le__ = __gt__ = __ge__ = __float__ = __int__ = __iter__ = __getitem__ = __len__ = _no_value
    __array_ufunc__ = None  # numbers of NumPy leave operators to the methods above

    def __bool__(self) -> bool:
        return True

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, operands: Any = (), settings: Any = None) -> NoReturn:
        raise no_value(next((x for x in operands if isinstance(x, Declared)), None))


def no_value(spec: Any) -> DeclarationError:
    """The error of an operation on what is only declared."""
    kind = spec.kind if isinstance(spec, Declared) else "value"
    line = users_line()
    place = f"\n{line.shown()}" if line else ""
    remedy = (
        'A factor is its scale, tttc.gate("lr", scale=0.1), a function of it its activation, for tttc.nn.TTT to make; '
        "or pass the layer the values computed."
        if kind == "gate"
        else "Compute with it in `learner` and `loss`, where it is a value of `self`."
    )
    return DeclarationError(
        f"arithmetic on a declared {kind}, which has no value in the class body.{place}\n  {remedy}"
    )


def short(value: Any) -> str:
    """A value in a message: on one line, and not at any length; of an object its class alone."""
    if isinstance(value, Declared):
        return f"a {value.kind}"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"a {type(value).__name__} of shape {list(value.shape)}"
    if callable(value):
        return f"the function {getattr(value, '__name__', type(value).__name__)}"
    text = repr(value)
    if " at 0x" in text or "\n" in text:
        return f"a {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."
