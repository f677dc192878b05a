"""Linear attention without and with decay: W_t = a_t W_{t-1} + dt_t k_t^T v_t, z_t = q_t W_t; the chunk is free.

Products of decays are exponentials of differences of summed logarithms, as in arXiv:2405.21060. The `whole` forms take
all chunks at once, as the short listing of that paper does.
"""

from __future__ import annotations

import torch

Tensors = dict[str, torch.Tensor]
Result = tuple[torch.Tensor, Tensors]


def linear(part: Tensors, params: Tensors, state: Tensors) -> Result:
    """arXiv:2006.16236."""
    q, k, v, W = part["q"], part["k"], part["v"], state["W"]
    z = q @ W + torch.tril(q @ k.transpose(-2, -1)) @ v
    return z, {"W": W + k.transpose(-2, -1) @ v}


def linear_whole(sequences: Tensors, params: Tensors, state: Tensors, chunk: int) -> Result:
    q, k, v = (in_chunks(sequences[n], chunk) for n in "qkv")
    added = torch.cumsum(k.transpose(-2, -1) @ v, 2)
    W = state["W"].unsqueeze(2)
    before = torch.cat([W, W + added[:, :, :-1]], 2)
    z = q @ before + torch.tril(q @ k.transpose(-2, -1)) @ v
    return z.flatten(2, 3), {"W": state["W"] + added[:, :, -1]}


def retnet(part: Tensors, params: Tensors, state: Tensors) -> Result:
    """arXiv:2307.08621."""
    return _decayed(part, _retained(part, params), None, state["W"])


def retnet_whole(sequences: Tensors, params: Tensors, state: Tensors, chunk: int) -> Result:
    return _decayed_whole(sequences, _retained(sequences, params), None, state["W"], chunk)


def mamba2(part: Tensors, params: Tensors, state: Tensors) -> Result:
    """arXiv:2405.21060."""
    return _decayed(part, torch.log(part["decay"]), part["dt"], state["W"])


def mamba2_whole(sequences: Tensors, params: Tensors, state: Tensors, chunk: int) -> Result:
    return _decayed_whole(sequences, torch.log(sequences["decay"]), sequences["dt"], state["W"], chunk)


def in_chunks(x: torch.Tensor, chunk: int) -> torch.Tensor:
    """[B, H, T, ...] as [B, H, T / C, C, ...]."""
    return x.unflatten(2, (-1, chunk))


def decays(total: torch.Tensor) -> torch.Tensor:
    """The products of the decays from each source token s, exclusive, to each token t: exp(sum_t - sum_s) for s <= t,
    otherwise 0.
    """
    size = total.shape[-1]
    future = torch.ones(size, size, dtype=torch.bool, device=total.device).triu(1)
    return torch.exp((total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(future, -torch.inf))


def _retained(part: Tensors, params: Tensors) -> torch.Tensor:
    """The logarithm of the decay of each head, for every token."""
    return torch.log(params["gamma"]).expand(part["q"].shape[:-1])


def _decayed(part: Tensors, log: torch.Tensor, rate: torch.Tensor | None, W: torch.Tensor) -> Result:
    q, k, v = part["q"], part["k"], part["v"]
    v = v if rate is None else v * rate.unsqueeze(-1)
    total = torch.cumsum(log, -1)
    z = (q @ k.transpose(-2, -1) * decays(total)) @ v + (q * torch.exp(total).unsqueeze(-1)) @ W
    end = total[..., -1:]
    kept = k * torch.exp(end - total).unsqueeze(-1)
    return z, {"W": torch.exp(end).unsqueeze(-1) * W + kept.transpose(-2, -1) @ v}


def _decayed_whole(
    sequences: Tensors, log: torch.Tensor, rate: torch.Tensor | None, W: torch.Tensor, chunk: int
) -> Result:
    q, k, v = (in_chunks(sequences[n], chunk) for n in "qkv")
    v = v if rate is None else v * in_chunks(rate, chunk).unsqueeze(-1)
    total = torch.cumsum(in_chunks(log, chunk), -1)
    end = total[..., -1:]
    made = (k * torch.exp(end - total).unsqueeze(-1)).transpose(-2, -1) @ v
    starts = torch.cat([W.unsqueeze(2), made], 2)  # what each chunk, and the beginning, hands on
    between = decays(torch.cumsum(torch.nn.functional.pad(end.squeeze(-1), (1, 0)), -1))
    before = (between @ starts.flatten(3)).unflatten(3, starts.shape[3:])
    z = (q @ k.transpose(-2, -1) * decays(total)) @ v + (q * torch.exp(total).unsqueeze(-1)) @ before[:, :, :-1]
    return z.flatten(2, 3), {"W": before[:, :, -1]}
