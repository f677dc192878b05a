"""Tokens one by one: plain decoding with the present fast weights, and a step of them where a chunk has ended.

A chunk ends with its last token, but what that token was to predict is known only when the next one comes: the step is
taken then, before the new token is read, so that it reads what it reads in a pass over the whole sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from tttc.errors import FileRefused, ShapeError
from tttc.networks.chunk_loss import TokenChunk
from tttc.networks.inner_update import FastWeights
from tttc.networks.passes import Learning
from tttc.networks.state_file import load, save

if TYPE_CHECKING:
    from tttc.networks.end_to_end import EndToEnd


@dataclass(frozen=True)
class NetworkState:
    """What sequences have learned and remember; of a size that does not grow with what they have read.

    `fast` are the fast weights [B, *shape] by name, and what their update carries; `logits` [B, V] say what follows the
    last token. The rest is what goes on: the caches of both modules, and of the open chunk what it began with, the
    hidden states that it has read, [B, t, d] each, and its tokens, [B, t] each.
    """

    fast: FastWeights
    chunk: int
    batch: int
    position: int = 0
    logits: Tensor = field(default_factory=lambda: torch.empty(0))
    prefix_caches: Any = None
    suffix_caches: Any = None
    opened_with: Any = None
    hidden: tuple[Tensor, ...] = ()
    tokens: tuple[Tensor, ...] = ()

    @property
    def open(self) -> int:
        """How many tokens the open chunk has."""
        return sum(x.shape[1] for x in self.tokens)

    @property
    def bytes(self) -> int:
        """Of all tensors in it."""
        leaves = [x for x in tree_flatten(self._parts())[0] if isinstance(x, Tensor)]
        return sum(x.numel() * x.element_size() for x in leaves)

    def detach(self) -> NetworkState:
        return self.map_tensors(Tensor.detach)

    def to(self, *args: Any, **kwargs: Any) -> NetworkState:
        """On another device, as `Tensor.to`."""
        return self.map_tensors(lambda x: x.to(*args, **kwargs))

    def save(self, path: str | Path, model: EndToEnd) -> Path:
        """Write it as a file of tensors that `load` reads; `StateMismatch` where its caches are not plain containers of
        tensors.
        """
        tree = {f.name: getattr(self, f.name) for f in fields(self)}
        return save(path, tree | {"fast": vars(self.fast)}, model.described())

    @staticmethod
    def load(path: str | Path, model: EndToEnd) -> NetworkState:
        """What `save` wrote, on the device of the model; raises `FileRefused` where it is damaged or of another one."""
        tree = load(path, model.described(), next(model.parameters()).device)
        if set(tree) != {f.name for f in fields(NetworkState)}:
            raise FileRefused(
                f"{path}: it holds {', '.join(tree)}, no state of a network.\n  Give one that `save` wrote."
            )
        return NetworkState(**tree | {"fast": FastWeights(**tree["fast"])})

    def _parts(self) -> tuple[Any, ...]:
        own = self.fast, self.logits, self.prefix_caches, self.suffix_caches
        return *own, self.opened_with, self.hidden, self.tokens

    def map_tensors(self, function: Callable[[Tensor], Tensor]) -> NetworkState:
        """With every tensor replaced by what `function` makes of it."""
        fast, logits, prefix, suffix, opened, hidden, tokens = tree_map(
            lambda x: function(x) if isinstance(x, Tensor) else x, self._parts()
        )
        return replace(
            self,
            fast=fast,
            logits=logits,
            prefix_caches=prefix,
            suffix_caches=suffix,
            opened_with=opened,
            hidden=hidden,
            tokens=tokens,
        )


@torch.no_grad()
def continued(model: EndToEnd, tokens: Tensor, state: NetworkState, rate: float) -> NetworkState:
    """The state after these tokens too, [B, t]; a piece of the sequence at a time, that ends where a chunk does."""
    if state.chunk != model.chunk:
        what = f"EndToEnd: the state is of chunks of {state.chunk} tokens, the network of {model.chunk}"
        raise ShapeError(f"{what}.\n  Pass the state that this network returned.")
    learning = model._learning(rate)
    for piece in _pieces(tokens, state, model.chunk):
        if state.open == model.chunk:
            state = _stepped(learning, state, piece[:, :1])
        hidden, prefix_caches = model.prefix(piece, state.prefix_caches)
        logits, caches = _logits(learning, state.fast, hidden, state.suffix_caches)
        state = replace(
            state,
            position=state.position + piece.shape[1],
            logits=logits[:, -1],
            prefix_caches=prefix_caches,
            suffix_caches=caches,
            hidden=(*state.hidden, hidden),
            tokens=(*state.tokens, piece),
        )
    return state


def _pieces(tokens: Tensor, state: NetworkState, chunk: int) -> Iterator[Tensor]:
    """The tokens, cut where chunks end."""
    first = chunk - state.open % chunk
    cuts = [first] if first < tokens.shape[1] else []
    while cuts and cuts[-1] + chunk < tokens.shape[1]:
        cuts.append(cuts[-1] + chunk)
    yield from tokens.tensor_split(cuts, 1)


def _logits(learning: Learning, fast: FastWeights, hidden: Tensor, caches: Any) -> tuple[Tensor, Any]:
    return learning.loss.logits(fast.weights, learning.slow, hidden, caches)


def _stepped(learning: Learning, state: NetworkState, following: Tensor) -> NetworkState:
    """After the step of a chunk that is full, now that what its last token was to predict, [B, 1], is known."""
    fast = state.fast
    if learning.update is not None:
        targets = torch.cat([*state.tokens, following], 1)[:, 1:]
        chunk = TokenChunk(torch.cat(state.hidden, 1), targets, torch.ones_like(targets, dtype=torch.bool))
        _, _, fast, _ = learning.advanced(fast, state.opened_with, chunk, last=False)
    return replace(state, fast=fast, opened_with=state.suffix_caches, hidden=(), tokens=())
