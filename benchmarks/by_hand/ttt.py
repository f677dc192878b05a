"""TTT-Linear and TTT-MLP, one mini-batch (arXiv:2407.04620, appendix A): gradients at its start, eta = tau_t * lr_s."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

Tensors = dict[str, torch.Tensor]
EPS = 1e-6
ROOT = math.sqrt(2 / math.pi)


def linear(part: Tensors, params: Tensors, state: Tensors) -> tuple[torch.Tensor, Tensors]:
    q, k, v = part["q"], part["k"], part["v"]
    gamma, beta, W, b = params["gamma"], params["beta"], state["W1"], state["b1"]
    g = norm_gradient(k @ W + b, v - k, gamma, beta)
    eta = torch.tril(part["tau"].unsqueeze(-1) * part["lr"].unsqueeze(-2))
    z = q @ W + b - (eta * (q @ k.transpose(-2, -1) + 1)) @ g
    last = eta[..., -1, :].unsqueeze(-1) * g
    new = {"W1": W - k.transpose(-2, -1) @ last, "b1": b - last.sum(-2, keepdim=True)}
    return q + gamma * F.layer_norm(z, z.shape[-1:], eps=EPS) + beta, new


def mlp(part: Tensors, params: Tensors, state: Tensors) -> tuple[torch.Tensor, Tensors]:
    q, k, v = part["q"], part["k"], part["v"]
    gamma, beta = params["gamma"], params["beta"]
    W1, b1, W2, b2 = (state[n] for n in ("W1", "b1", "W2", "b2"))
    z1 = k @ W1 + b1
    x2 = F.gelu(z1, approximate="tanh")
    z2 = x2 @ W2 + b2
    g2 = norm_gradient(z2, v - k, gamma, beta)
    g1 = g2 @ W2.transpose(-2, -1) * gelu_gradient(z1)
    eta = torch.tril(part["tau"].unsqueeze(-1) * part["lr"].unsqueeze(-2))
    z1_bar = q @ W1 + b1 - (eta * (q @ k.transpose(-2, -1) + 1)) @ g1
    x2_bar = F.gelu(z1_bar, approximate="tanh")
    z2_bar = x2_bar @ W2 + b2 - (eta * (x2_bar @ x2.transpose(-2, -1) + 1)) @ g2
    last = eta[..., -1, :].unsqueeze(-1)
    new = {
        "W1": W1 - (last * k).transpose(-2, -1) @ g1,
        "b1": b1 - (last * g1).sum(-2, keepdim=True),
        "W2": W2 - (last * x2).transpose(-2, -1) @ g2,
        "b2": b2 - (last * g2).sum(-2, keepdim=True),
    }
    return q + gamma * F.layer_norm(z2_bar, z2_bar.shape[-1:], eps=EPS) + beta, new


def norm_gradient(z: torch.Tensor, target: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    """d/dz of 0.5 * |layer_norm(z) - target|^2."""
    width = z.shape[-1]
    variance, mean = torch.var_mean(z, -1, keepdim=True, unbiased=False)
    deviation = torch.sqrt(variance + EPS)
    normal = (z - mean) / deviation
    g = (gamma * normal + beta - target) * gamma
    return (width * g - g.sum(-1, keepdim=True) - normal * (g * normal).sum(-1, keepdim=True)) / (width * deviation)


def gelu_gradient(x: torch.Tensor) -> torch.Tensor:
    """The derivative of the tanh form of gelu."""
    t = torch.tanh(ROOT * x * (1 + 0.044715 * x * x))
    return 0.5 * x * ((1 - t * t) * (ROOT + 3 * 0.044715 * ROOT * x * x)) + 0.5 * (1 + t)
