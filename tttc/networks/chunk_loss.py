"""What a chunk of tokens loses at the fast weights of each sequence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from tttc.errors import DeclarationError
from tttc.networks.cross_entropy import nll

Tensors = dict[str, Tensor]


class TokenChunk(NamedTuple):
    """Tokens that share one gradient: `hidden` [B, t, d] is what the suffix is given, `targets` [B, t] what follows
    each token, `counts` [B, t] whether that is asked for.
    """

    hidden: Tensor
    targets: Tensor
    counts: Tensor


class ChunkLoss:
    """The suffix of a network as a function of its parameters, `fast` and slow ones."""

    def __init__(self, suffix: nn.Module, fast: str | Sequence[str] = ()) -> None:
        self.suffix = suffix
        own = dict(suffix.named_parameters())
        names = {p: n for n, p in own.items()}
        # a parameter may stand in several modules: each is given the same tensor, and each module once
        places = [(f"{m}.{n}".lstrip("."), p) for m, x in suffix.named_modules() for n, p in x._parameters.items()]
        self._given_as = {place: names[p] for place, p in places if p is not None}
        self._dtypes = {n: p.dtype for n, p in own.items()}
        self.fast = _matched(suffix, (fast,) if isinstance(fast, str) else tuple(fast))

    def weights(self) -> Tensors:
        """The fast weights that sequences begin with."""
        return {n: p for n, p in self.suffix.named_parameters() if n in self.fast}

    def slow(self) -> Tensors:
        return {n: p for n, p in self.suffix.named_parameters() if n not in self.fast}

    def logits(self, weights: Tensors, slow: Tensors, hidden: Tensor, caches: Any) -> tuple[Tensor, Any]:
        """[B, t, V], and the caches after these tokens. `weights` are [B, *shape], one for each sequence; without any,
        the suffix is as it is.
        """
        if not weights:
            return self.suffix(hidden, caches)
        given = {n: w.to(self._dtypes[n]) for n, w in weights.items()}
        if len(hidden) == 1:
            return self._called({n: w[0] for n, w in given.items()}, slow, hidden, caches)
        leaves, form = tree_flatten(caches)
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        after: list[tuple[list[Any], TreeSpec]] = []

        def of_one(weights: Tensors, hidden: Tensor, *own: Tensor) -> tuple[Tensor, ...]:
            filled = tree_unflatten(_filled(leaves, [x[None] for x in own]), form)
            logits, made = self._called(weights, slow, hidden[None], filled)
            after.append(tree_flatten(made))
            return logits[0], *(x[0] for x in after[-1][0] if isinstance(x, Tensor))

        logits, *own = torch.vmap(of_one, randomness="different")(given, hidden, *tensors)
        made, new_form = after[-1]
        return logits, tree_unflatten(_filled(made, own), new_form)

    def __call__(self, weights: Tensors, slow: Tensors, chunk: TokenChunk, caches: Any) -> tuple[Tensor, Tensor, Any]:
        """The mean loss of each sequence over the tokens that count, [B]; the loss of each token, [B, t], 0 where it
        does not; and the caches. Without any token that counts the mean is 0.
        """
        logits, caches = self.logits(weights, slow, chunk.hidden, caches)
        each = torch.where(chunk.counts, nll(logits, chunk.targets), 0.0)
        return each.sum(1) / chunk.counts.sum(1).clamp_min(1), each, caches

    def _called(self, weights: Mapping[str, Tensor], slow: Tensors, hidden: Tensor, caches: Any) -> tuple[Tensor, Any]:
        given = {**slow, **weights}
        named = {n: given[own] for n, own in self._given_as.items()}
        return torch.func.functional_call(self.suffix, named, (hidden, caches), tie_weights=False)


def _filled(leaves: list[Any], tensors: Sequence[Tensor]) -> list[Any]:
    """The leaves, with these tensors in the places of theirs."""
    own = iter(tensors)
    return [next(own) if isinstance(x, Tensor) else x for x in leaves]


def _matched(suffix: nn.Module, patterns: tuple[str, ...]) -> tuple[str, ...]:
    """The parameters whose names match one of the patterns; raises where a pattern matches none."""
    names = [n for n, _ in suffix.named_parameters()]
    for pattern in patterns:
        if any(_matches(n, pattern) for n in names):
            continue
        buffers = [n for n, _ in suffix.named_buffers() if _matches(n, pattern)]
        what = f"EndToEnd: fast={pattern!r} matches no parameter of the suffix"
        if buffers:
            what += f", only the buffer `{buffers[0]}`, which no gradient is taken of"
            remedy = "Make it an nn.Parameter, or name other weights."
        else:
            shown = "".join(f"\n    {n}" for n in names[:12]) + ("\n    ..." if len(names) > 12 else "")
            remedy = f"Names are as in suffix.named_parameters(), * matches dots too:{shown}"
        raise DeclarationError(f"{what}.\n  {remedy}")
    return tuple(n for n in names if any(_matches(n, p) for p in patterns))


def _matches(name: str, pattern: str) -> bool:
    """Names are those in the suffix, or in the whole network."""
    return fnmatchcase(name, pattern) or fnmatchcase(f"suffix.{name}", pattern)
