"""Tokens as sequences: what each is to predict, and which predictions count. Packed documents are laid side by side."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from tttc.errors import ShapeError


@dataclass(frozen=True)
class Documents:
    """`inputs`, `targets` and `counts` [B, T]; of packed documents `places`, where in the pack each row lies."""

    inputs: Tensor
    targets: Tensor
    counts: Tensor
    places: tuple[tuple[int, int], ...] | None = None
    total: int = 0

    @staticmethod
    def of(tokens: Tensor, mask: Tensor | None, cu_seqlens: Any) -> Documents:
        """Of tokens [B, T + 1]; raises `ShapeError` where these are no tokens to predict."""
        if tokens.dim() != 2 or tokens.is_floating_point() or tokens.is_complex():
            what = f"EndToEnd: tokens are {tokens.dtype} of the shape {list(tokens.shape)}"
            raise ShapeError(f"{what}, expected whole numbers [B, T + 1].\n  Token t + 1 is what token t predicts.")
        shape = [len(tokens), tokens.shape[1] - 1]
        if shape[1] < 1:
            what = f"EndToEnd: tokens are {list(tokens.shape)}, which is T = {max(shape[1], 0)} predictions"
            raise ShapeError(f"{what}.\n  Give [B, T + 1] tokens with T >= 1: each predicts the next.")
        counts = torch.ones(shape, dtype=torch.bool, device=tokens.device) if mask is None else mask.bool()
        if list(counts.shape) != shape:
            what = f"EndToEnd: mask has the shape {list(counts.shape)}, expected {shape}"
            raise ShapeError(f"{what}.\n  It says of each prediction, [B, T] for tokens [B, T + 1], whether it counts.")
        whole = Documents(tokens[:, :-1], tokens[:, 1:], counts)
        return whole if cu_seqlens is None else whole._side_by_side(tokens, cu_seqlens)

    def asked(self, chunk: int) -> Tensor:
        """Which sequences have a prediction that counts in which chunk, [B, n]."""
        return torch.stack([c.any(1) for c in self.counts.split(chunk, 1)], 1)

    def packed(self, nll: Tensor) -> Tensor:
        """Numbers of predictions [B, T], as the tokens were given: of packed ones [1, total - 1], 0 at borders."""
        if self.places is None:
            return nll
        pieces, at = [], 0
        for row, (begin, end) in zip(nll, self.places, strict=True):
            pieces += [nll.new_zeros(begin - at), row[: end - begin]]
            at = end
        return torch.cat([*pieces, nll.new_zeros(self.total - at)])[None]

    def _side_by_side(self, tokens: Tensor, cu_seqlens: Any) -> Documents:
        """Each document a row, filled up at its end with predictions that do not count."""
        borders = [int(x) for x in (cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else cu_seqlens)]
        rising = all(a <= b for a, b in pairwise(borders))
        if len(tokens) != 1 or len(borders) < 2 or borders[0] != 0 or borders[-1] != tokens.shape[1] or not rising:
            what = f"EndToEnd: cu_seqlens is {borders}, tokens are {list(tokens.shape)}"
            raise ShapeError(f"{what}.\n  Packed tokens are [1, total], and cu_seqlens rises from 0 to total.")
        places = [(a, b - 1) for a, b in pairwise(borders) if b - a > 1]
        if not places:
            raise ShapeError(f"EndToEnd: no document of {borders} has two tokens, so that one predicts the other.")
        longest = max(b - a for a, b in places)
        lengths = [longest - (b - a) for a, b in places]

        def rows(x: Tensor) -> Tensor:
            pieces = (x[0, a:b] for a, b in places)
            return torch.stack([pad(piece, (0, n)) for piece, n in zip(pieces, lengths, strict=True)])

        inputs, targets, counts = rows(self.inputs), rows(self.targets), rows(self.counts)
        return Documents(inputs, targets, counts, tuple(places), tokens.shape[1] - 1)
