"""A kernel for a GPU as text and a few numbers: with these it can be launched where TVM is not installed."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass

from tttc.backends.tvm.machine import BYTES


@dataclass(frozen=True)
class CudaSource:
    """A kernel as text, and what a launch needs to know: the parameters in order, the block, its shared memory.

    A parameter is a tensor, or a number that `int` marks. `workspaces` are tensors that the caller allocates: their
    dtype and, for each batch element and head, their shape, "T" for the tokens of the call and "T16" for these as whole
    sixteens.
    """

    name: str
    text: str
    parameters: tuple[tuple[str, str], ...]
    threads: int
    shared: int
    workspaces: dict[str, tuple[str, tuple[int | str, ...]]]

    @property
    def outside(self) -> int:
        """Bytes for each batch element and head of the workspaces whose size does not depend on the call."""
        fixed = [
            (dtype, shape) for dtype, shape in self.workspaces.values() if not any(n in shape for n in ("T", "T16"))
        ]
        return sum(BYTES[dtype] * math.prod(int(n) for n in shape) for dtype, shape in fixed)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @staticmethod
    def from_json(text: str) -> CudaSource:
        found = json.loads(text)
        found["parameters"] = tuple((n, kind) for n, kind in found["parameters"])
        found["workspaces"] = {n: (dtype, tuple(shape)) for n, (dtype, shape) in found["workspaces"].items()}
        return CudaSource(**found)


def stride_name(tensor: str, axis: int) -> str:
    """What the distance of a tensor's batch elements, heads or tokens is called."""
    return f"{tensor}_stride_{'bht'[axis]}"


__all__ = ["CudaSource", "stride_name"]
