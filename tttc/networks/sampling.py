"""Tokens drawn one by one from what a network predicts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tttc.errors import ShapeError
from tttc.networks.decoding import NetworkState

if TYPE_CHECKING:
    from tttc.networks.end_to_end import EndToEnd


def sampled(
    model: EndToEnd,
    tokens: Tensor,
    new: int,
    temperature: float,
    top_k: int | None,
    generator: torch.Generator | None,
    state: NetworkState | None,
) -> Tensor:
    """Tokens [B, T] and `new` more, [B, T + new]; see `EndToEnd.generate`."""
    if new < 0 or temperature < 0 or (top_k is not None and top_k < 1):
        what = f"EndToEnd: generate(new={new}, temperature={temperature}, top_k={top_k})"
        raise ShapeError(f"{what}.\n  new and temperature are at least 0, top_k at least 1.")
    state = model.prefill(tokens) if state is None else model.decode(tokens, state)[1]
    found = [tokens]
    for i in range(new):
        found.append(drawn(state.logits, temperature, top_k, generator)[:, None].to(tokens.dtype))
        if i < new - 1:
            _, state = model.decode(found[-1][:, 0], state)
    return torch.cat(found, 1)


def drawn(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """One token of each row of logits [B, V]: [B]."""
    if temperature == 0:
        return logits.argmax(-1)
    scaled = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        least = scaled.topk(top_k, -1).values[:, -1:]
        scaled = scaled.masked_fill(scaled < least, -torch.inf)
    return torch.multinomial(scaled.softmax(-1), 1, generator=generator)[:, 0]
