"""A kernel for a GPU as text and a few numbers: with these it can be launched where TVM is not installed."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass

from tttc.backends.tvm_cpu.machine import BYTES
from tttc.ir.names import spelled


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


class CudaWords:
    """What variables are called in the text of a kernel: letters of ASCII, and `_` at the end, which no word of CUDA
    has and none of its functions, nor what TVM and this package have in the text beside.
    """

    def __init__(self) -> None:
        self._words: dict[str, str] = {}
        self.identities: dict[str, str] = {}

    def __call__(self, name: str) -> str:
        if name not in self._words:
            word = re.sub(r"[^A-Za-z0-9_]", lambda m: f"u{ord(m[0]):x}", spelled(name)) + "_"
            while word in self.identities:
                word += "_"
            self._words[name], self.identities[word] = word, name
        return self._words[name]
