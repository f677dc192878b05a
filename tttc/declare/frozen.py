"""A learner alone, of any declaration: its loss is what comes from above, and nothing else of it is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tttc.declare.functions import upstream
from tttc.declare.read import signature
from tttc.declare.sizes import known_sizes
from tttc.declare.specs import TokenSpec
from tttc.declare.update_rules import sgd
from tttc.declare.user_functions import traced_output
from tttc.declare.variant import Signature, Variant
from tttc.errors import DeclarationError, Problem, problems_text, refusal
from tttc.ir.expr import Expr, leaves
from tttc.ir.names import as_declared


def frozen_signature(variant: type[Variant], dims: Mapping[str, int]) -> Signature:
    """The declaration of the learner of `variant`: z = learner(q), with the derivative of z in the place of v.

    Raises:
        DeclarationError: where the learner reads a token or a gate beside x, or not even that.
    """
    declared = signature(_alone(variant))
    with known_sizes(dims):
        output, problems = traced_output(declared)
    if output is None:
        raise refusal(declared.name, problems)
    _refuse_more_than_x(declared, output.expr)
    x, z = TokenSpec(declared.tokens["q"].dims), TokenSpec(output.dims)
    return replace(declared, tokens={"q": x, "k": x, "v": z}, gates={}, attributes={}, traced={})


def _alone(variant: type[Variant]) -> type[Variant]:
    """The class with a loss from above and the update of one step, so that nothing else of it is asked for."""
    if not (isinstance(variant, type) and issubclass(variant, Variant)):
        signature(variant)  # which says what is wrong

    def loss(self: Any, k: Any) -> Any:
        return upstream(self.learner(k))

    settings = {"mini_batch": "all", "read": "start", "anchor": "mini_batch", "steps": 1, "update": sgd(lr=1.0)}
    about = {"__module__": variant.__module__, "__doc__": variant.__doc__}
    return type(variant.__name__, (variant,), {"loss": loss, "output": Variant.output, **settings, **about})


def _refuse_more_than_x(declared: Signature, z: Expr) -> None:
    read = {e.name: e.role for e in leaves([z]) if e.role in ("token", "gate")}
    q = declared.identity("token", "q")
    if more := [f"{role} `{as_declared(n)}`" for n, role in read.items() if n != q]:
        what = f"the learner reads {', '.join(more)}, and is given x alone."
        remedy = "Make it a state or a param, or write that part of the network outside of the learner."
        raise DeclarationError(problems_text(declared.name, [Problem(what, remedy)]))
    if not read:
        what, remedy = "the learner does not read x: it is the same for every token.", "Let `learner` use its argument."
        raise DeclarationError(problems_text(declared.name, [Problem(what, remedy)]))
