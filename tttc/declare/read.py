"""A declaration read off its class: what it takes and keeps, and everything wrong with it but for its functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tttc.declare.declared import short
from tttc.declare.number import whole
from tttc.declare.rule_checks import rates_of, rule_problems, setting_problems
from tttc.declare.specs import GateSpec, ParamSpec, StateSpec, TokenSpec
from tttc.declare.suggest import near
from tttc.declare.value_checks import name_problems, value_problems
from tttc.declare.variant import Absent, Signature, Variant
from tttc.errors import DeclarationError, Problem, refusal


def signature(variant: type[Variant]) -> Signature:
    """Read the declaration; raises `DeclarationError` with every problem found."""
    found, problems = read_declaration(variant)
    if problems:
        raise refusal(variant.__name__, problems)
    return found


def read_declaration(variant: type[Variant]) -> tuple[Signature, list[Problem]]:
    """The signature and everything wrong with it; used by `signature` and by `tttc check`.

    Raises `DeclarationError` where `variant` is no declaration at all.
    """
    _refuse_other_than_a_class(variant)
    declared = {name: spec for base in reversed(variant.__mro__) for name, spec in vars(base).items()}
    states = {name: spec for name, spec in declared.items() if isinstance(spec, StateSpec)}
    params = {name: spec for name, spec in declared.items() if isinstance(spec, ParamSpec)}
    tokens = {name: TokenSpec(("D",)) for name in ("q", "k", "v")}
    tokens |= {name: spec for name, spec in declared.items() if isinstance(spec, TokenSpec)}
    own = {name: spec for name, spec in declared.items() if isinstance(spec, GateSpec)}
    update = variant.update
    gates, twice = _by_name([*own.values(), *(r for _, r in rates_of(update) if isinstance(r, GateSpec))])
    attributes = {name: spec.name for name, spec in own.items()}
    b = variant.mini_batch if (n := whole(variant.mini_batch)) is None else n
    settings = (b, variant.read, variant.anchor, whole(variant.steps) or 0, update, variant.qk_norm)
    found = Signature(variant, states, params, gates, tokens, attributes, *settings)
    return found, [
        *setting_problems(found),
        *twice,
        *rule_problems(found),
        *name_problems(found),
        *value_problems(found),
    ]


def _by_name(used: Sequence[GateSpec]) -> tuple[dict[str, GateSpec], list[Problem]]:
    """Gates by their names, and those that are declared in two ways."""
    gates: dict[str, GateSpec] = {}
    problems = []
    for spec in used:
        known = gates.setdefault(spec.name, spec)
        if known.dims != spec.dims:
            what = f"gate `{spec.name}` is declared twice, per {known.per} and per {spec.per}."
            problems.append(Problem(what, "Give one of them another name.", spec.where))
    return gates, problems


def _refuse_other_than_a_class(variant: Any) -> None:
    """Raise where something else stands in the place of a declaration: an instance, a name."""
    if isinstance(variant, type) and issubclass(variant, Absent):
        raise variant.refusal()
    if isinstance(variant, type) and issubclass(variant, Variant):
        return
    if isinstance(variant, Variant):
        name = type(variant).__name__
        raise DeclarationError(f"an instance of `{name}` stands where the class belongs.\n  Pass {name}, not {name}().")
    remedy = "Pass a subclass of tttc.Variant."
    if isinstance(variant, str):
        plain = {c.__name__.lower(): c.__name__ for c in _ready()}
        found = near(variant.replace("_", "").replace("-", "").lower(), plain, 0.6)
        remedy = f"Is it tttc.library.{plain[found]}? {remedy}" if found else remedy
    raise DeclarationError(f"{short(variant)} is no declaration.\n  {remedy}")


def _ready() -> list[type[Variant]]:
    """The declarations of `tttc.library`, which is one of those who declare."""
    known = [Variant]
    for c in known:
        known += c.__subclasses__()
    return [c for c in known if c.__module__ == "tttc.library"]
