"""Whether the inner loop can be stable on the data it is given: `layer(..., check=True)` warns where it cannot."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

from tttc.ir.expr import TOKENS, leaves, postorder
from tttc.ir.online import gain
from tttc.ir.ops import evaluate
from tttc.ir.primal import per_token
from tttc.ir.program import LoopProgram
from tttc.ir.reading import terms_of

if TYPE_CHECKING:
    from tttc.runtime.arguments import BoundCall
    from tttc.runtime.layer import Layer

MOST_SEQUENCES = 16  # at most so many sequences are looked at
LARGEST = 2.0  # a step multiplies the error by 1 - gain: beyond 2 its size grows


class UnstableInnerLoop(UserWarning):
    """A learning rate at which a linear learner's error grows with every step on the same token."""


def warn_of_growth(layer: Layer, call: BoundCall) -> None:
    """Warn with the largest lr * |k|^2 found (times the curvature of the loss), where it exceeds 2.

    For learners that are linear in their weights, with a loss that is quadratic; silent for others.
    """
    primal = layer.stages.of(LoopProgram)
    update = primal.update
    gradients, _ = per_token(primal)
    products = {w.name: terms_of(gradients[w.name], w.axes) for w in update.states}
    found = gain(products, update.states, update.lr, {**primal.dims, TOKENS: max(call.tokens, 1)})
    if found is None or not call.tokens:
        return
    largest, at = 0.0, (0, 0)
    for g in range(min(MOST_SEQUENCES, call.batch * call.heads)):
        values = _values(found, call, g)
        if values.size and float(values.max()) > largest:
            largest, at = float(values.max()), (g, int(values.argmax()))
    if largest > LARGEST:
        warnings.warn(
            f"variant `{layer.signature.name}`: at token {at[1]} of head {at[0] % call.heads} the learning rate times "
            f"the squared length of the key is {largest:.3g} > 2.\n"
            "  A step on it makes its error larger: the inner loop can diverge. Lower lr, or normalise k "
            "(tttc.l2_norm).",
            UnstableInnerLoop,
            stacklevel=5,
        )


def _values(e: Any, call: BoundCall, g: int) -> np.ndarray:
    """The expression on the tokens of one batch element and head."""
    known, sizes = {}, {}
    for x in leaves([e]):
        found = call.params[x.name] if x.at is None else call.sequences[x.name]
        known[x] = found[divmod(g, call.heads)].detach().double().cpu().numpy()
    for node in postorder([e]):
        for axis in node.axes:
            sizes[axis.name] = call.tokens if axis.size == TOKENS else call.layer.dims[axis.size]
    return np.broadcast_to(evaluate(e, known, sizes), (call.tokens,))
