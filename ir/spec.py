"""What a program may hold after each stage: its type, its operations and statements, and the kinds of its leaves.

A table that reads from top to bottom as what the compiler does: nothing along the tokens of a chunk before there are
chunks, transposes only of what was differentiated, composites until they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tttc.ir.expr import OPS
from tttc.ir.program import (
    AdjointProgram,
    Allocate,
    Block,
    DualProgram,
    For,
    GradientProgram,
    LoopProgram,
    Program,
    Restore,
    Save,
    ScanProgram,
    Statement,
    TokenProgram,
)

COMPOSITES = frozenset(op.name for op in OPS.values() if op.lower)
TRANSPOSES = frozenset(("put_last", "shift_back"))  # of what reads the last token, or the one before
ALONG_TOKENS = frozenset(("mask", "segprod", "cumprod", "shift", "solve"))
OF_ONE_TOKEN = frozenset(OPS) - ALONG_TOKENS - TRANSPOSES - {"last"}

DECLARED = frozenset(("state", "param", "token", "gate"))  # what a user names
CARRIED = DECLARED | {"output", "memory", "sum"}


@dataclass(frozen=True)
class Spec:
    """`kinds` are the roles of leaves, read or assigned; `places` the loop variables that index their tokens."""

    program: type[Program]
    ops: frozenset[str]
    kinds: frozenset[str]
    places: frozenset[str | None] = frozenset((None,))
    statements: tuple[type[Statement], ...] = (Block,)


_LOOPS: tuple[type[Statement], ...] = (Block, For, Allocate)
_TOKENS, _CHUNKS = frozenset((None, "t", "m")), frozenset((None, "c", "m"))
_WITH_GRADIENTS = DECLARED | {"output", "gradient"}
_OF_CHUNKS = frozenset(OPS) - TRANSPOSES

SPECS: Mapping[str, Spec] = {
    "declare": Spec(TokenProgram, OF_ONE_TOKEN, DECLARED | {"output"}),
    "differentiate": Spec(GradientProgram, OF_ONE_TOKEN, _WITH_GRADIENTS),
    "simplify": Spec(GradientProgram, OF_ONE_TOKEN, _WITH_GRADIENTS),
    "primal": Spec(LoopProgram, OF_ONE_TOKEN | {"last"}, CARRIED, _TOKENS, _LOOPS),
    "dualize": Spec(DualProgram, _OF_CHUNKS, CARRIED, _TOKENS | _CHUNKS, _LOOPS),
    "schedule": Spec(ScanProgram, _OF_CHUNKS, CARRIED, _CHUNKS, _LOOPS),
    "adjoint": Spec(
        AdjointProgram,
        frozenset(OPS) - COMPOSITES,
        CARRIED | {"saved", "cotangent"},
        _CHUNKS,
        (*_LOOPS, Save, Restore),
    ),
    "emit": Spec(AdjointProgram, frozenset(), frozenset(), statements=()),  # text, and no program any more
}
