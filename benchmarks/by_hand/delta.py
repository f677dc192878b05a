"""The delta rule, exact token by token, by one triangular system for each chunk (arXiv:2406.06484, 2412.06464).

With D[t, s] the product of the decays after s up to t, and a_t that from the chunk's start:

    (I + stril(diag(lr) (D * K K^T))) U = diag(lr) (V - diag(a) K W)
    Z = diag(a) Q W + tril(D * Q K^T) U,    W' = a_C W + (D[C, s] K)^T U

The chunk is free. The `whole` forms solve the systems of all chunks at once, for V and for K, and loop over the states.
"""

from __future__ import annotations

import torch

from benchmarks.by_hand.attention import Result, Tensors, decays, in_chunks


def delta(part: Tensors, params: Tensors, state: Tensors) -> Result:
    q, k, v, W, rate = part["q"], part["k"], part["v"], state["W"], part["lr"].unsqueeze(-1)
    u = _solved(rate * (k @ k.transpose(-2, -1)), rate * (v - k @ W))
    z = q @ W + torch.tril(q @ k.transpose(-2, -1)) @ u
    return z, {"W": W + k.transpose(-2, -1) @ u}


def gated_delta(part: Tensors, params: Tensors, state: Tensors) -> Result:
    q, k, v, W, rate = part["q"], part["k"], part["v"], state["W"], part["lr"].unsqueeze(-1)
    total = torch.cumsum(torch.log(part["decay"]), -1)
    between, since = decays(total), torch.exp(total).unsqueeze(-1)
    u = _solved(rate * (k @ k.transpose(-2, -1)) * between, rate * (v - (since * k) @ W))
    z = (since * q) @ W + (q @ k.transpose(-2, -1) * between) @ u
    kept = k * between[..., -1, :].unsqueeze(-1)
    return z, {"W": since[..., -1:, :] * W + kept.transpose(-2, -1) @ u}


def delta_whole(sequences: Tensors, params: Tensors, state: Tensors, chunk: int) -> Result:
    q, k, v = (in_chunks(sequences[n], chunk) for n in "qkv")
    rate = in_chunks(sequences["lr"], chunk).unsqueeze(-1)
    made, undone = _solved(rate * (k @ k.transpose(-2, -1)), rate * torch.cat([v, k], -1)).split(
        [v.shape[-1], k.shape[-1]], -1
    )
    inside = torch.tril(q @ k.transpose(-2, -1))
    W, outputs = state["W"], []
    for i in range(q.shape[2]):
        u = made[:, :, i] - undone[:, :, i] @ W
        outputs.append(q[:, :, i] @ W + inside[:, :, i] @ u)
        W = W + k[:, :, i].transpose(-2, -1) @ u
    return torch.cat(outputs, 2), {"W": W}


def gated_delta_whole(sequences: Tensors, params: Tensors, state: Tensors, chunk: int) -> Result:
    q, k, v = (in_chunks(sequences[n], chunk) for n in "qkv")
    rate = in_chunks(sequences["lr"], chunk).unsqueeze(-1)
    total = torch.cumsum(in_chunks(torch.log(sequences["decay"]), chunk), -1)
    between, since = decays(total), torch.exp(total).unsqueeze(-1)
    made, undone = _solved(rate * (k @ k.transpose(-2, -1)) * between, rate * torch.cat([v, since * k], -1)).split(
        [v.shape[-1], k.shape[-1]], -1
    )
    inside, read = q @ k.transpose(-2, -1) * between, since * q
    kept = k * between[..., -1, :].unsqueeze(-1)
    W, outputs = state["W"], []
    for i in range(q.shape[2]):
        u = made[:, :, i] - undone[:, :, i] @ W
        outputs.append(read[:, :, i] @ W + inside[:, :, i] @ u)
        W = since[:, :, i, -1:] * W + kept[:, :, i].transpose(-2, -1) @ u
    return torch.cat(outputs, 2), {"W": W}


def _solved(matrix: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """(I + stril(matrix))^-1 right; the solver reads nothing but what is below the diagonal."""
    return torch.linalg.solve_triangular(matrix, right, upper=False, unitriangular=True)
