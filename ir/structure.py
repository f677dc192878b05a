"""What a program computes as one short text: equal for programs that differ in their name, or in the sizes of dims."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from tttc.ir.expr import Expr, postorder
from tttc.ir.program import LoopProgram, TokenProgram


def structure(program: LoopProgram) -> str:
    """A checksum of the functions of one token and of the update rule: nothing that a schedule chooses is in it.

    The program is that of any stage from the primal on. Names of states, gates and params count, the order of their
    declaration does too; that of the variant, its dims and its dtype do not.
    """
    functions = [(f.params, f.body, f.returns) for f in program.per_token]
    return hashlib.sha256(written((program.update, functions)).encode()).hexdigest()[:24]


def digest(program: TokenProgram) -> str:
    """A checksum of what was declared, sizes included: the functions of one token, the update rule and the dims.

    The program is that of the stage `declare`, `layer.stages.of(TokenProgram)`, before anything is derived from it. The
    name of the variant, its dtype, and all that a schedule or a backend chooses are not in it: layers of one digest
    read each other's states.
    """
    functions = [(f.name, f.params, f.body, f.returns) for f in program.functions]
    return hashlib.sha256(written((functions, program.update, sorted(program.dims.items()))).encode()).hexdigest()


def written(x: Any) -> str:
    """Any part of a program as text, the same for equal parts in every process."""
    lines = _Written()
    last = lines.of(x)
    return "\n".join([*lines.lines, last])


class _Written:
    """Nodes as numbered lines, each once; everything else as it is printed."""

    def __init__(self) -> None:
        self.numbers: dict[Expr, int] = {}
        self.lines: list[str] = []

    def of(self, x: Any) -> str:
        if isinstance(x, Expr):
            return self._node(x)
        if isinstance(x, Mapping):
            return f"{{{', '.join(f'{self.of(k)}: {self.of(v)}' for k, v in x.items())}}}"
        if isinstance(x, (tuple, list)):
            return f"({', '.join(map(self.of, x))})"
        if is_dataclass(x):
            return f"{type(x).__name__}({', '.join(self.of(getattr(x, f.name)) for f in fields(x))})"
        return repr(x)

    def _node(self, e: Expr) -> str:
        for node in postorder([e]):
            if node not in self.numbers:
                operands = ", ".join(f"#{self.numbers[s]}" for s in node.src)
                line = f"{node.op} {self.of(node.arg)} ({operands})"
                self.numbers[node] = len(self.lines)
                self.lines.append(line)
        return f"#{self.numbers[e]}"
