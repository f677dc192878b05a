"""TTT-MLP's dual form as one writes it by hand in eager PyTorch (arXiv:2407.04620, appendix A): the yardstick of the
benchmarks.

The inner gradients are written out, as the published implementations do; torch.autograd takes the outer ones.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

EPS = 1e-6


def hand_written(x: dict[str, torch.Tensor], mini_batch: int) -> torch.Tensor:
    """z: [B, T, H, D] from q, k, v [B, T, H, D], lr, tau [B, T, H], gamma, beta [H, D] and W1, b1, W2, b2 [H, ...]."""
    B = x["q"].shape[0]
    q, k, v = (x[n].transpose(1, 2) for n in ("q", "k", "v"))  # [B, H, T, D]
    lr, tau = (x[n].transpose(1, 2) for n in ("lr", "tau"))
    gamma, beta = (x[n].unsqueeze(1) for n in ("gamma", "beta"))  # [H, 1, D]
    W1, W2 = (x[n].expand(B, *x[n].shape) for n in ("W1", "W2"))
    b1, b2 = (x[n].unsqueeze(1).expand(B, -1, -1, -1) for n in ("b1", "b2"))
    outputs = []
    for start in range(0, q.shape[2], mini_batch):
        part = slice(start, start + mini_batch)
        z, W1, b1, W2, b2 = _mini_batch(
            q[:, :, part], k[:, :, part], v[:, :, part], lr[:, :, part], tau[:, :, part], gamma, beta, W1, b1, W2, b2
        )
        outputs.append(z)
    return torch.cat(outputs, 2).transpose(1, 2)


def _mini_batch(q, k, v, lr, tau, gamma, beta, W1, b1, W2, b2):  # type: ignore[no-untyped-def]
    z1 = k @ W1 + b1
    x2 = F.gelu(z1, approximate="tanh")
    z2 = x2 @ W2 + b2
    g2 = _norm_gradient(z2, v - k, gamma, beta)
    g1 = g2 @ W2.transpose(-2, -1) * _gelu_gradient(z1)
    eta = torch.tril(tau.unsqueeze(-1) * lr.unsqueeze(-2))
    z1_bar = q @ W1 + b1 - (eta * (q @ k.transpose(-2, -1) + 1)) @ g1
    x2_bar = F.gelu(z1_bar, approximate="tanh")
    z2_bar = x2_bar @ W2 + b2 - (eta * (x2_bar @ x2.transpose(-2, -1) + 1)) @ g2
    last = eta[..., -1, :].unsqueeze(-1)
    z = q + gamma * F.layer_norm(z2_bar, z2_bar.shape[-1:], eps=EPS) + beta
    W1 = W1 - (last * k).transpose(-2, -1) @ g1
    b1 = b1 - (last * g1).sum(-2, keepdim=True)
    W2 = W2 - (last * x2).transpose(-2, -1) @ g2
    b2 = b2 - (last * g2).sum(-2, keepdim=True)
    return z, W1, b1, W2, b2


def _norm_gradient(z: torch.Tensor, target: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    """d/dz of 0.5 * |layer_norm(z) - target|^2."""
    width = z.shape[-1]
    variance, mean = torch.var_mean(z, -1, keepdim=True, unbiased=False)
    deviation = torch.sqrt(variance + EPS)
    normal = (z - mean) / deviation
    g = (gamma * normal + beta - target) * gamma
    return (width * g - g.sum(-1, keepdim=True) - normal * (g * normal).sum(-1, keepdim=True)) / (width * deviation)


def _gelu_gradient(x: torch.Tensor) -> torch.Tensor:
    t = torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x))
    return 0.5 * x * ((1 - t * t) * (0.79788456 + 0.1070322243 * x * x)) + 0.5 * (1 + t)
