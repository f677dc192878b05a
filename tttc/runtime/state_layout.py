"""What the states of a layer hold: which tensors by group and name, and their sizes.

layout = state_layout(layer, position=3)     # of a state that stands 3 tokens into a mini-batch
layout["weights"]["W1"]                      # (64, 256): the axes after those of batch and heads
layout["rows"]["q"]                          # (3, 64) where an open mini-batch is kept as its tokens
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tttc.ir.program import EACH

if TYPE_CHECKING:
    from tttc.runtime.layer import Layer

Sizes = tuple[int, ...]
Layout = dict[str, dict[str, Sizes]]


def opens(layer: Layer) -> bool:
    """Whether a call may end inside a mini-batch, so that the position of a state is not always 0."""
    plan = layer.sequencing.plan
    return not plan.free and not plan.substitution and plan.mini_batch != 1


def state_layout(layer: Layer, position: int) -> Layout:
    """All that a state there may hold, but what a call measured. `start`, and `summed` or `rows`, are those of an open
    mini-batch; `memory` and `taps` are there once the first token was seen.
    """
    declared, sequencing = layer.signature, layer.sequencing

    def sized(names: Sequence[str]) -> Sizes:
        return tuple(layer.dims[d] for d in names)

    weights = {n: sized(s.dims) for n, s in declared.states.items()}
    tokens = {declared.identity("token", n): s for n, s in declared.tokens.items()}
    found: Layout = {
        "weights": weights,
        "memory": {m.name: sized([a.size for a in m.axes]) for m in sequencing.memory},
        "taps": {n: (layer.dims[s.window] - 1, *sized(s.given)) for n, s in tokens.items() if s.window is not None},
    }
    if not opens(layer):
        return found
    found["start"] = weights
    if layer.decode == "rows":
        rows = {n: (position, *sized(s.dims)) for n, s in tokens.items()}
        rows |= {declared.identity("gate", n): (position, *sized(s.dims)) for n, s in declared.gates.items()}
        found["rows"] = rows | ({EACH.name: (position,)} if sequencing.counts else {})
    else:
        found["summed"] = {o.variable.name: sized([a.size for a in o.variable.axes]) for o in sequencing.opened}
    return found
