"""The declaration: what a user writes to define a Test-Time-Training variant.

A `Variant` subclass lists its fast weights (`state`), slow weights (`param`) and per-token inputs (`gate`, `token`),
and defines `learner` and `loss`. The class runs: bound to float64 torch tensors it *is* the definition of correct
(`tttc/reference.py`); bound to traced values it gives the compiler the same two functions (`tttc/declare/tracer.py`).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tttc.declare.specs import GateSpec, ParamSpec, Spec, StateSpec, TokenSpec
from tttc.declare.suggest import near
from tttc.declare.update_rules import SGD
from tttc.errors import DeclarationError, SourceLine
from tttc.ir.names import apart

READS = ("after", "before", "start", "end")
ANCHORS = ("mini_batch", "token")
VARIANT_SETTINGS = ("mini_batch", "read", "anchor", "steps", "update", "qk_norm")


class Variant:
    """Base class of every declaration; see the README for one of 12 lines."""

    mini_batch: int | str = 16
    read: str = "after"
    anchor: str = "mini_batch"
    steps: int = 1
    qk_norm: bool = False
    """Whether the rule wants q and k of length one. `tttc.nn.TTT` makes them so; the compiled layer takes them as they
    come.
    """
    update: SGD = SGD(lr=1.0)

    def learner(self, x: Any) -> Any:
        """The inner-loop model on one token x: [D]."""
        raise DeclarationError(f"variant `{type(self).__name__}` declares no `learner(self, x)`")

    def loss(self, k: Any, v: Any) -> Any:
        """The self-supervised task on one token, a scalar; `loss(self, k)` where v is not read, or by `tttc.upstream`
        alone.
        """
        raise DeclarationError(f"variant `{type(self).__name__}` declares no `loss(self, k, v)`")

    def output(self, q: Any) -> Any:
        """What a token reads; the learner itself unless overridden."""
        return self.learner(q)

    @classmethod
    def bind(cls, values: Mapping[str, Any]) -> Any:
        """An instance whose states, params, gates and extra tokens are `values`: its functions then run on them."""
        return bind(cls, values)

    @classmethod
    def replace(cls, **settings: Any) -> type[Variant]:
        """The same declaration with other settings: `TTTLinear.replace(mini_batch=4, read="before")`."""
        unknown = sorted(set(settings) - set(VARIANT_SETTINGS))
        if unknown:
            found = [m for n in unknown if (m := near(n, VARIANT_SETTINGS, 0.6))]
            meant = f"Is it {', '.join(found)}? " if found else ""
            raise DeclarationError(
                f"variant `{cls.__name__}`: no such setting: {', '.join(unknown)}.\n"
                f"  {meant}The settings are {', '.join(VARIANT_SETTINGS)}."
            )
        about = {"__module__": cls.__module__, "__doc__": cls.__doc__, "__replaced__": settings}
        return type(cls.__name__, (cls,), {**settings, **about})


def bind(variant: type[Variant], values: Mapping[str, Any]) -> Any:
    """The same as `variant.bind`, also where a declared value is called `bind`."""
    bound = object.__new__(variant)
    bound.__dict__.update(values)
    return bound


class Absent(Variant):
    """Stands for the class of a declaration of which only the program is there, read from a file."""

    @classmethod
    def refusal(cls) -> DeclarationError:
        """What is said where the class is needed."""
        return DeclarationError(
            f"variant `{cls.__name__}` was read from a file, which has its program and not its class.\n"
            "  Import the declaration, and compile that, for its definition, its verification or tttc.nn.TTT."
        )


@dataclass(frozen=True)
class Signature:
    """What a declaration takes and keeps, read off the class once."""

    variant: type[Variant]
    states: dict[str, StateSpec]
    params: dict[str, ParamSpec]
    gates: dict[str, GateSpec]
    tokens: dict[str, TokenSpec]
    attributes: dict[str, str]  # attribute on `self` -> name of the gate it reads
    mini_batch: int | str
    read: str
    anchor: str
    steps: int
    update: SGD
    qk_norm: bool = False
    traced: dict[tuple[int, ...], Any] = field(default_factory=dict, compare=False, repr=False)
    """What its functions were traced into, by the sizes that `tttc.size` gave meanwhile: they run once for each."""

    @property
    def name(self) -> str:
        return self.variant.__name__

    @property
    def by_role(self) -> dict[str, Mapping[str, Spec]]:
        """Everything declared with axes, by what it is."""
        return {"token": self.tokens, "gate": self.gates, "param": self.params, "state": self.states}

    @property
    def specs(self) -> tuple[Spec, ...]:
        """Everything declared with axes: tokens (q, k and v first), states, params, gates."""
        return (*self.tokens.values(), *self.states.values(), *self.params.values(), *self.gates.values())

    @property
    def dims(self) -> tuple[str, ...]:
        """Every dim name that the declaration mentions, those of q, k and v first."""
        return tuple(dict.fromkeys(dim for spec in self.specs for dim in spec.dims))

    def identity(self, role: str, name: str) -> str:
        """What a declared value is called in the IR: so, unless a gate has a name that an attribute has as well, or a
        token one that a state or a param has.
        """
        attributes = (self.states, self.params)
        others = {"gate": (*attributes, self.tokens), "token": attributes}.get(role, ())
        return apart(name, role) if any(name in group for group in others) else name

    def rate_name(self, rate: ParamSpec) -> str:
        """The attribute that a `param` used inside `update` was declared as."""
        return next(name for name, spec in self.params.items() if spec is rate)


def is_dim(name: Any) -> bool:
    """A dim is a name."""
    return isinstance(name, str) and name.isidentifier()


def class_line(variant: type[Variant]) -> SourceLine | None:
    """Where a class is written, if that is known. Its whole file is parsed for it: asked only for a problem."""
    try:
        file = inspect.getsourcefile(variant)
        _, line = inspect.getsourcelines(variant)
    except (OSError, TypeError, KeyError):  # no file; or, as TVM patches `inspect`, no such module
        return None
    return SourceLine(file, line) if file else None
