"""Three layers, one of them gated, and RMSNorm, one mini-batch, gradients at its start: two learners in no paper."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from benchmarks.by_hand.ttt import Tensors, gelu_gradient


def library(part: Tensors, params: Tensors, state: Tensors) -> tuple[torch.Tensor, Tensors]:
    """x + rms_norm(tanh((silu(x Wg) * (x W1)) W2) W3), mean((f(k) - v)^2), a rate of its own for Wg."""
    q, k, v, gamma = part["q"], part["k"], part["v"], params["gamma"]
    W1, Wg, W2, W3 = (state[n] for n in ("W1", "Wg", "W2", "W3"))
    p, a = k @ Wg, k @ W1
    s = torch.sigmoid(p)
    h = p * s * a
    t = torch.tanh(h @ W2)
    g3 = rms_gradient(t @ W3, (v - k), gamma, 1e-2) * (2 / k.shape[-1])
    g2 = g3 @ W3.transpose(-2, -1) * (1 - t * t)
    back = g2 @ W2.transpose(-2, -1)
    g1, gg = back * p * s, back * a * s * (1 + p * (1 - s))
    rate, rate_g = part["lr"].unsqueeze(-2), part["lr_gate"].unsqueeze(-2)
    scores = torch.tril(q @ k.transpose(-2, -1))
    h_bar = F.silu(q @ Wg - (scores * rate_g) @ gg) * (q @ W1 - (scores * rate) @ g1)
    t_bar = torch.tanh(_read(h_bar, W2, h, g2, rate))
    y_bar = _read(t_bar, W3, t, g3, rate)
    lr, lr_g = part["lr"].unsqueeze(-1), part["lr_gate"].unsqueeze(-1)
    new = {
        "W1": W1 - (lr * k).transpose(-2, -1) @ g1,
        "Wg": Wg - (lr_g * k).transpose(-2, -1) @ gg,
        "W2": W2 - (lr * h).transpose(-2, -1) @ g2,
        "W3": W3 - (lr * t).transpose(-2, -1) @ g3,
    }
    return q + gamma * F.rms_norm(y_bar, y_bar.shape[-1:], eps=1e-2), new


def invented(part: Tensors, params: Tensors, state: Tensors) -> tuple[torch.Tensor, Tensors]:
    """x + rms_norm(((gelu(x W1) W2) * sigmoid(x Wg)) W3), 0.5 |f(k) - v|^2, eta = tau_t * lr_s."""
    q, k, v, gamma = part["q"], part["k"], part["v"], params["gamma"]
    W1, W2, Wg, W3 = (state[n] for n in ("W1", "W2", "Wg", "W3"))
    z1 = k @ W1
    h = F.gelu(z1, approximate="tanh")
    y, s = h @ W2, torch.sigmoid(k @ Wg)
    m = y * s
    g3 = rms_gradient(m @ W3, v - k, gamma, 1e-6)
    gm = g3 @ W3.transpose(-2, -1)
    g2, gg = gm * s, gm * m * (1 - s)
    g1 = g2 @ W2.transpose(-2, -1) * gelu_gradient(z1)
    eta = torch.tril(part["tau"].unsqueeze(-1) * part["lr"].unsqueeze(-2))
    scores = eta * (q @ k.transpose(-2, -1))
    h_bar = F.gelu(q @ W1 - scores @ g1, approximate="tanh")
    m_bar = (h_bar @ W2 - (eta * (h_bar @ h.transpose(-2, -1))) @ g2) * torch.sigmoid(q @ Wg - scores @ gg)
    y_bar = m_bar @ W3 - (eta * (m_bar @ m.transpose(-2, -1))) @ g3
    last = eta[..., -1, :].unsqueeze(-1)
    new = {
        "W1": W1 - (last * k).transpose(-2, -1) @ g1,
        "W2": W2 - (last * h).transpose(-2, -1) @ g2,
        "Wg": Wg - (last * k).transpose(-2, -1) @ gg,
        "W3": W3 - (last * m).transpose(-2, -1) @ g3,
    }
    return q + gamma * F.rms_norm(y_bar, y_bar.shape[-1:], eps=1e-6), new


def rms_gradient(y: torch.Tensor, target: torch.Tensor, gamma: torch.Tensor, eps: float) -> torch.Tensor:
    """d/dy of 0.5 * |rms_norm(y) - target|^2."""
    scale = torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    normal = y * scale
    g = (gamma * normal - target) * gamma
    return scale * (g - normal * (g * normal).mean(-1, keepdim=True))


def _read(x: torch.Tensor, W: torch.Tensor, seen: torch.Tensor, g: torch.Tensor, rate: torch.Tensor) -> torch.Tensor:
    """x W_t, where W_t has seen the tokens up to t."""
    return x @ W - (torch.tril(x @ seen.transpose(-2, -1)) * rate) @ g
