"""The dual form: one block for each mini-batch, without the weights of any single token (ir/chunk.py)."""

from __future__ import annotations

from dataclasses import replace

from tttc.ir.chunk import DEFAULT_CHUNK, whole_form
from tttc.ir.expr import TOKENS
from tttc.ir.gradient_class import classified
from tttc.ir.primal import loop_params
from tttc.ir.program import (
    SEQUENCE,
    T_AXIS,
    Allocate,
    Block,
    DualProgram,
    For,
    Function,
    LoopProgram,
    Statement,
)
from tttc.ir.reading import at_chunk
from tttc.ir.simplify import renamed_hints, simplify_assigns
from tttc.ir.update import beginning, observed


def dualize(program: LoopProgram) -> DualProgram:
    """From the loop over tokens to one block per mini-batch; where tokens come one after the other, and results depend
    on where their mini-batch ends, that loop is the form already.
    """
    dual = classified(program)
    update = dual.update
    chunk = DEFAULT_CHUNK if update.mini_batch is SEQUENCE else min(update.mini_batch, DEFAULT_CHUNK)
    form = whole_form(dual, {**program.dims, TOKENS: chunk})  # refused here, if it has to be
    sequential = dual.gradients.sequential
    if sequential and update.mini_batch != 1 and observed(update):
        return dual
    assigns, names, _ = simplify_assigns([form.z, *form.updates], renamed_hints(program.names, form.moved))
    step = 1 if sequential else update.mini_batch
    loop = For("c", SEQUENCE, step, (Block(assigns),))
    body: tuple[Statement, ...] = (Allocate(form.z.target), *beginning(update), loop)
    params = tuple(at_chunk(p, T_AXIS) for p in loop_params(program))
    function = Function(program.name, params, body, (form.z.target, *update.states))
    return replace(dual, functions=(function,), names=names)
