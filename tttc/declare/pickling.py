"""Declarations in files and in other processes: `pickle`, `torch.save`, and copies of what holds one.

A class is written by its name, as pickle writes every class; one that `Variant.replace` made, by that of its base and
its settings. A class that has no name to be imported by is refused by pickle itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from tttc.declare.specs import ParamSpec
from tttc.declare.update_rules import ROLES, SGD
from tttc.declare.variant import Variant

_known: dict[type, PickledVariant] = {}


class PickledVariant:
    """A declaration, to be written to a file: `PickledVariant.of(variant)`, whose `variant` is what is read again."""

    def __init__(self, variant: type[Variant]) -> None:
        self.variant = variant

    @staticmethod
    def of(variant: type[Variant]) -> PickledVariant:
        """The same for the same class, so that a file holds it once."""
        return _known.setdefault(variant, PickledVariant(variant))

    def __deepcopy__(self, memo: Any) -> PickledVariant:
        return self  # a class

    def __reduce__(self) -> tuple[Any, ...]:
        settings = vars(self.variant).get("__replaced__")
        if settings is None:
            return PickledVariant.of, (self.variant,)
        base = self.variant.__mro__[1]
        return _replaced, (PickledVariant.of(base), _with_rates(settings, lambda rate: _named(base, rate)))


@dataclass(frozen=True)
class _Named:
    """A param of the declaration, used as a rate: it is the attribute of its class, and no copy of it."""

    attribute: str


def _named(base: type[Variant], rate: Any) -> Any:
    if not isinstance(rate, ParamSpec):
        return rate
    names = [n for kind in base.__mro__ for n, spec in vars(kind).items() if spec is rate]
    return _Named(names[0]) if names else rate


def _replaced(base: PickledVariant, settings: Mapping[str, Any]) -> PickledVariant:
    found = _with_rates(settings, lambda rate: getattr(base.variant, rate.attribute) if type(rate) is _Named else rate)
    made = Variant.replace.__func__(base.variant, **found)  # type: ignore[attr-defined]  # `replace` may be a state
    return PickledVariant.of(made)


def _with_rates(settings: Mapping[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    """The settings with each rate of an update changed."""
    update = settings.get("update")
    if not isinstance(update, SGD):
        return dict(settings)
    rates: dict[str, Any] = {}
    for role in ROLES:
        value = getattr(update, role)
        rates[role] = {n: change(r) for n, r in value.items()} if isinstance(value, Mapping) else change(value)
    return {**settings, "update": replace(update, **rates)}
