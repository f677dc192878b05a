"""Where the gradients of a chunk are taken, and so which form it has: decided once for a program."""

from __future__ import annotations

from tttc.ir.chunk import DEFAULT_CHUNK, Chunk
from tttc.ir.expr import TOKENS
from tttc.ir.linearity import Dependence, dependence
from tttc.ir.online import NotTriangular
from tttc.ir.primal import per_token
from tttc.ir.program import DualProgram, GradientClass, LoopProgram, Update
from tttc.ir.reading import nonlinear_use


def classified(program: LoopProgram) -> DualProgram:
    """The program with the class of its gradients; its functions are still the loop."""
    return _with(program, gradient_class(program))


def _with(program: LoopProgram, gradients: GradientClass) -> DualProgram:
    return DualProgram.of(program, "dualize", gradients=gradients)


def gradient_class(program: LoopProgram) -> GradientClass:
    """The class of the gradients, with the operation that decided it."""
    update = program.update
    found = _of_gradients(program, update)
    inside = update.read in ("after", "before") and not program.telemetry  # else a mini-batch is looked at as a whole
    if not (inside or (update.mini_batch == 1 and update.read != "start")) or found.kind not in ("constant", "affine"):
        return found
    _, reading = per_token(program)
    node = nonlinear_use(reading.value, update.states, {**program.dims, TOKENS: 1})
    if node is None:
        return found
    why = f"tokens read a matrix of weights of their own nonlinearly (`{node.op}`): one token after the other"
    return GradientClass("sequential", found.finding, why)


def _of_gradients(program: LoopProgram, update: Update) -> GradientClass:
    """The class as far as the gradients decide it."""
    gradients, _ = per_token(program)
    found = max((dependence(g, update.states) for g in gradients.values()), key=lambda f: f.dependence)
    if found.dependence == Dependence.CONSTANT:
        return GradientClass("constant", found, "the gradients do not depend on the weights")
    if update.anchor == "mini_batch":
        return GradientClass("frozen", found, "gradients are taken at the mini-batch's start")
    if update.clip is not None:
        why = "clipping makes the gradients nonlinear in the weights: one token after the other"
        return GradientClass("sequential", found, why)
    affine = GradientClass("affine", found, "the gradients are affine in the weights: one triangular system per chunk")
    try:
        Chunk(_with(program, affine), {**program.dims, TOKENS: DEFAULT_CHUNK}, opened=False).solved_rows()
    except NotTriangular as reason:
        return GradientClass("sequential", found, f"{reason}: one token after the other")
    return affine
