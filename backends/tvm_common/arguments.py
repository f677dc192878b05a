"""The tensors of a kernel in their order: what its function declares, and what a scan calls it with."""

from __future__ import annotations

from typing import NamedTuple

from tttc.ir.expr import Expr
from tttc.ir.names import own, suffixed
from tttc.ir.program import Scan, cotangent

LAUNCHED = tuple(map(own, ("batch", "heads", "tokens", "groups", "places")))
"""The lengths that all tensors have in common, by name; a loop is told "every", too."""


class Argument(NamedTuple):
    """A variable of the caller, [B, H, T, ...] or [B, H, ...]; with the suffix "kept" or "work" its values where groups
    of chunks begin, or at each chunk of a group: [B, H, n, ...]. What comes "in" and goes "out" is told apart, too.
    """

    of: Expr
    suffix: str = ""

    @property
    def name(self) -> str:
        return suffixed(self.of.name, self.suffix) if self.suffix else self.of.name


def arguments(scan: Scan, backward: bool) -> list[Argument]:
    """Of a forward kernel: inputs, outputs, the new carry, and of a loop what is kept of it. Of a backward: inputs, the
    carry last, cotangents that come in, those of the inputs, and of a loop memory for the carries of a group.
    """
    made = [a.target for a in scan.updates]
    if not backward:
        found = [Argument(p, "in" if p in scan.carry else "") for p in scan.params]
        found += [*(Argument(a.target) for a in scan.outputs), *(Argument(p, "out") for p in made)]
        return [*found, *(Argument(p, "kept") for p in scan.carry)] if scan.loops else found
    found = [Argument(p) for p in (*scan.fixed, *scan.sequence)]
    found += [Argument(p, "kept" if scan.loops else "in") for p in scan.carry]
    found += [*(Argument(cotangent(a.target)) for a in scan.outputs), *(Argument(cotangent(p), "in") for p in made)]
    found += [Argument(cotangent(p), "out") for p in scan.params]
    return [*found, *(Argument(p, "work") for p in scan.carry)] if scan.loops else found


def stride_name(tensor: str, axis: int) -> str:
    """What the distance of a tensor's batch elements, heads or tokens is called."""
    return suffixed(tensor, f"stride_{'bht'[axis]}")
