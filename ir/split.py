"""A scan as two: one for what is carried, and one for the outputs, of which every chunk is by itself.

    for c in chunks(T, 16):                    for c in chunks(T, 16):      one after the other, and less to do in each
        z[c] = f(W, q[c], k[c])        ->          W_at[c] = W;  W = g(W, k[c])
        W = g(W, k[c])                         for c in chunks(T, 16):      all at once
                                                   z[c] = f(W_at[c], q[c], k[c])

What both need, such as the gradients of the chunk, each of them makes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from tttc.ir import cost
from tttc.ir.cost import CHUNK
from tttc.ir.expr import leaves
from tttc.ir.program import SEQUENCE, Assign, Scan, Tokens


@dataclass(frozen=True)
class Split:
    """The two scans. `outputs` reads the carry and gives none; every chunk of it has that with which it begins."""

    states: Scan
    outputs: Scan

    def saved(self, dims: Mapping[str, int]) -> float:
        """Which part of the FLOPs of a chunk the chunks after it do not wait for: 0.4 of them, say."""
        whole = _flops((*self.outputs.outputs, *self.states.updates), dims, self.states.chunk)
        return 1 - _flops(self.states.updates, dims, self.states.chunk) / whole


def split(scan: Scan) -> Split | None:
    """Both parts; None where there is one alone: no loop, nothing carried, or no outputs."""
    if not scan.loops or scan.chunk is SEQUENCE or not scan.outputs or not scan.updates:
        return None
    doc = "The carry before every chunk, and after the last one."
    states = _reading(replace(scan, name=f"{scan.name}_states", outputs=(), doc=doc, differentiated=False))
    doc = "The outputs of every chunk, from the carry before it."
    outputs = _reading(replace(scan, name=f"{scan.name}_outputs", updates=(), doc=doc, differentiated=False))
    return Split(replace(states, carry=scan.carry), outputs)


def _reading(scan: Scan) -> Scan:
    """Without the variables that its block does not read."""
    read = {e.name for e in leaves(a.value for a in scan.block.assigns)}
    fixed, carry, sequence = (
        tuple(p for p in group if p.name in read) for group in (scan.fixed, scan.carry, scan.sequence)
    )
    return replace(scan, fixed=fixed, carry=carry, sequence=sequence)


def _flops(assigns: Sequence[Assign], dims: Mapping[str, int], chunk: Tokens) -> float:
    work = cost.work(a.value for a in assigns)
    return float(cost.evaluate(work.contraction + work.elementwise, dims, {CHUNK: cost.tokens(chunk)}))
