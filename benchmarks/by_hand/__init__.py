"""Dual forms as one writes them by hand in eager PyTorch: the yardsticks of the benchmarks.

A form is a function of one chunk: `step(part, params, state) -> z, state`, with the tokens and gates of the chunk
[B, H, C, ...], params that broadcast against them, and states [B, H, ...], vectors as rows [B, H, 1, F]. `run` loops it
over a sequence. The inner gradients are written out, as the published implementations do; torch.autograd takes the
outer ones. Where the mathematics allows it, `whole` does the work of all chunks at once, as published implementations
for GPUs do, and loops over nothing or over what must wait.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from benchmarks.by_hand import attention, delta, gated, ttt

Tensors = dict[str, torch.Tensor]
Step = Callable[[Tensors, Tensors, Tensors], tuple[torch.Tensor, Tensors]]
Whole = Callable[[Tensors, Tensors, Tensors, int], tuple[torch.Tensor, Tensors]]


class Form(NamedTuple):
    """The hand-written form of a variant."""

    step: Step
    whole: Whole | None = None
    chunk_free: bool = False
    """Whether any chunk gives the same result; otherwise the chunk is the mini-batch."""


FORMS = {
    "TTTLinear": Form(ttt.linear),
    "TTTMLP": Form(ttt.mlp),
    "LinearAttention": Form(attention.linear, attention.linear_whole, True),
    "RetNet": Form(attention.retnet, attention.retnet_whole, True),
    "Mamba2": Form(attention.mamba2, attention.mamba2_whole, True),
    "DeltaNet": Form(delta.delta, delta.delta_whole, True),
    "GatedDeltaNet": Form(delta.gated_delta, delta.gated_delta_whole, True),
    "GatedThreeLayer": Form(gated.library),
    "Invented": Form(gated.invented),
}


def run(step: Step, sequences: Tensors, params: Tensors, state: Tensors, chunk: int) -> tuple[torch.Tensor, Tensors]:
    """z [B, T, H, E] and the final states [B, H, ...] from sequences [B, T, H, ...], params [H, ...], states."""
    sequences, params, current = _laid_out(sequences, params, state)
    outputs = []
    for start in range(0, sequences["q"].shape[2], chunk):
        part = {n: x[:, :, start : start + chunk] for n, x in sequences.items()}
        z, current = step(part, params, current)
        outputs.append(z)
    return torch.cat(outputs, 2).transpose(1, 2), _given(current, state)


def run_whole(
    whole: Whole, sequences: Tensors, params: Tensors, state: Tensors, chunk: int
) -> tuple[torch.Tensor, Tensors]:
    """The same by a form that takes all chunks at once; the chunk divides the number of tokens."""
    z, final = whole(*_laid_out(sequences, params, state), chunk)
    return z.transpose(1, 2), _given(final, state)


def _laid_out(sequences: Tensors, params: Tensors, state: Tensors) -> tuple[Tensors, Tensors, Tensors]:
    """Heads before tokens; params and vectors of the state as rows."""
    rows = {n: w.unsqueeze(-2) if w.dim() == 3 else w for n, w in state.items()}
    return (
        {n: x.transpose(1, 2) for n, x in sequences.items()},
        {n: p.unsqueeze(1) for n, p in params.items()},
        rows,
    )


def _given(rows: Tensors, state: Tensors) -> Tensors:
    """States in the shapes that they came in."""
    return {n: w.reshape(state[n].shape) for n, w in rows.items()}


__all__ = ["FORMS", "Form", "Step", "Whole", "run", "run_whole"]
