"""Whether modules that are to predict the next token see it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tttc.backends.memory import fake
from tttc.errors import DeclarationError

TRIED_TOKENS = 16  # tokens that are tried


@torch.no_grad()
def check_causal(prefix: nn.Module, suffix: nn.Module, tokens: Tensor) -> bool:
    """Whether it could be tried; raises `DeclarationError` where what a module says of the first tokens changes with
    those after them. Both are run on a few tokens of one sequence, as in evaluation, and again with another
    second half.
    """
    few = tokens[:1, :TRIED_TOKENS]
    if few.shape[1] < 2 or few.device.type == "meta" or fake([few]):
        return False
    training = [m for m in (*prefix.modules(), *suffix.modules()) if m.training]
    with torch.random.fork_rng(enabled=bool(training)):
        for m in training:
            m.training = False
        try:
            _tried("prefix", lambda x: prefix(x, None), few, _changed(few))
            hidden, _ = prefix(few, None)
            other = hidden.clone()
            other[:, few.shape[1] // 2 :] += 1.0
            _tried("suffix", lambda x: suffix(x, None), hidden, other)
        finally:
            for m in training:
                m.training = True
    return True


def _changed(tokens: Tensor) -> Tensor:
    """Other tokens in the second half: each is the one before the first half's, or 0 or 1."""
    half = tokens.shape[1] // 2
    other = tokens.clone()
    other[:, half:] = torch.where(tokens[:, half:] == 0, tokens.amax().clamp_min(1), 0)
    return other


def _tried(name: str, module: Callable[[Tensor], Any], given: Tensor, other: Tensor) -> None:
    half = given.shape[1] // 2
    results = []
    for x in (given, other):
        found = module(x)
        if not (isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], Tensor)):
            what = f"EndToEnd: the {name} returned a {type(found).__name__}"
            takes = "tokens, caches) -> h, caches" if name == "prefix" else "h, caches) -> logits, caches"
            raise DeclarationError(f"{what}.\n  It is to return two things: {name}({takes}.")
        results.append(found[0][:, :half].double())
    apart = (results[0] - results[1]).abs().amax().item()
    if not apart <= 1e-3 * max(results[0].abs().amax().item(), 1.0) and results[0].isfinite().all():
        raise DeclarationError(
            f"EndToEnd: the {name} is not causal: what it says of the first {half} tokens changes by {apart:.2g} with "
            f"the {given.shape[1] - half} after them.\n"
            "  Mask its attention: token t may read tokens up to t alone, or it would be told what it is to predict."
        )
