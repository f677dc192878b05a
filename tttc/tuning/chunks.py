"""The chunks that are tried for a program."""

from __future__ import annotations

import math
from typing import Any

from tttc.ir.program import SEQUENCE, DualProgram, Plan
from tttc.ir.schedule import choose_plan

TRIED = (1, 8, 16, 32, 64, 128, 256, 512)
SMALLEST_TILE = 16  # of a mini-batch: smaller ones read and write its weights too often


def chunk_choices(program: DualProgram, tokens: int, preferred: int | None = None) -> tuple[int, ...]:
    """Chunks that differ, for a program that is not scheduled yet; the default first, which is what the backend
    prefers where it does, then what is near it.

    Empty where the mini-batch leaves no choice.
    """
    default = choose_plan(program, preferred)
    if default.chunk is SEQUENCE:
        return ()
    start = default.chunk
    found = {_layout(default): start}
    for chunk in TRIED:
        plan = choose_plan(program, chunk)
        if plan.chunk is SEQUENCE or (not plan.free and plan.chunk < SMALLEST_TILE):
            continue
        if plan.chunk <= max(tokens, start):
            found.setdefault(_layout(plan), plan.chunk)
    nearest = sorted(found.values(), key=lambda c: abs(math.log2(c / start)))
    return tuple(nearest) if len(nearest) > 1 else ()


def _layout(plan: Plan) -> tuple[Any, ...]:
    return plan.chunk, plan.mini_batch, plan.rows, plan.substitution
