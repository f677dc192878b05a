"""The published equations, transcribed into plain PyTorch: what the library's declarations must mean.

Nothing here comes from `tttc`, and no inner gradient comes from autograd: each is the paper's closed form, or is
derived by hand through the layers. One batch element, one head, row vectors: `y = x @ W`, `W: [dk, dv]`. Every function
takes `q`, `k`, `v` (`[T, D]`), gates (`[T]`, or `[T, D]` per channel), params, initial states and further sequences by
name, and the mini-batch's length (an int or "all"; the last one ends with the sequence). It returns the outputs `z` and
the final states by name, differentiable in every input.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
Size = int | str
Result = tuple[Tensor, Tensors]
Transcription = Callable[[Tensor, Tensor, Tensor, Tensors, Tensors, Tensors, Tensors, Size], Result]

NS5 = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)


def mini_batches(tokens: int, size: Size) -> Iterator[slice]:
    """The tokens of each mini-batch."""
    step = tokens if isinstance(size, str) else size
    for start in range(0, tokens, step):
        yield slice(start, min(start + step, tokens))


def gelu(x: Tensor) -> Tensor:
    """½x(1 + tanh(√(2/π)(x + 0.044715x³)))."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def gelu_derivative(x: Tensor) -> Tensor:
    """With t the tanh in `gelu`: ½(1 + t) + ½x(1 − t²)·√(2/π)(1 + 3·0.044715x²)."""
    t = torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    return 0.5 * (1 + t) + 0.5 * x * (1 - t**2) * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x**2)


def silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def silu_derivative(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1 + x * (1 - s))


def standardize(z: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """x̂ = (z − μ)/σ and σ = √(var + eps), with the biased variance."""
    centred = z - z.mean(-1, keepdim=True)
    sigma = torch.sqrt((centred**2).mean(-1, keepdim=True) + eps)
    return centred / sigma, sigma


def layer_norm(z: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    return gamma * standardize(z)[0] + beta


def layer_norm_vjp(z: Tensor, gamma: Tensor, dy: Tensor) -> Tensor:
    """u = γ∘dy; (u − mean(u) − x̂·mean(u∘x̂)) / σ."""
    x, sigma = standardize(z)
    u = gamma * dy
    return (u - u.mean(-1, keepdim=True) - x * (u * x).mean(-1, keepdim=True)) / sigma


def outer(x: Tensor, g: Tensor) -> Tensor:
    """x_sᵀ g_s of every row s."""
    return x[:, :, None] * g[:, None, :]


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, gates: Tensors, params: Tensors, state: Tensors, tokens: Tensors, mini_batch: Size
) -> Result:
    """Linear attention (arXiv:2006.16236): W_t = W_{t−1} + k_tᵀv_t, z_t = q_t W_t."""
    W, z = state["W"], []
    for t in range(len(k)):
        W = W + torch.outer(k[t], v[t])
        z.append(q[t] @ W)
    return torch.stack(z), {"W": W}


def retnet(
    q: Tensor, k: Tensor, v: Tensor, gates: Tensors, params: Tensors, state: Tensors, tokens: Tensors, mini_batch: Size
) -> Result:
    """RetNet (arXiv:2307.08621): W_t = γ W_{t−1} + k_tᵀv_t, z_t = q_t W_t."""
    W, z = state["W"], []
    for t in range(len(k)):
        W = params["gamma"] * W + torch.outer(k[t], v[t])
        z.append(q[t] @ W)
    return torch.stack(z), {"W": W}


def mamba2(
    q: Tensor, k: Tensor, v: Tensor, gates: Tensors, params: Tensors, state: Tensors, tokens: Tensors, mini_batch: Size
) -> Result:
    """Mamba-2 (arXiv:2405.21060): W_t = α_t W_{t−1} + Δ_t k_tᵀv_t, z_t = q_t W_t."""
    W, z = state["W"], []
    for t in range(len(k)):
        W = gates["decay"][t] * W + gates["dt"][t] * torch.outer(k[t], v[t])
        z.append(q[t] @ W)
    return torch.stack(z), {"W": W}


def gla(
    q: Tensor, k: Tensor, v: Tensor, gates: Tensors, params: Tensors, state: Tensors, tokens: Tensors, mini_batch: Size
) -> Result:
    """Gated linear attention (arXiv:2312.06635): W_t = diag(α_t) W_{t−1} + k_tᵀv_t, one α per key channel."""
    W, z = state["W"], []
    for t in range(len(k)):
        W = gates["decay"][t][:, None] * W + torch.outer(k[t], v[t])
        z.append(q[t] @ W)
    return torch.stack(z), {"W": W}


def deltanet(
    q: Tensor, k: Tensor, v: Tensor, gates: Tensors, params: Tensors, state: Tensors, tokens: Tensors, mini_batch: Size
) -> Result:
    """DeltaNet (arXiv:2102.11174, 2406.06484): W_t = W_{t−1} − β_t k_tᵀ(k_t W_{t−1} − v_t), z_t = q_t W_t."""
    W, z = state["W"], []
    for t in range(len(k)):
        W = W - gates["lr"][t] * torch.outer(k[t], k[t] @ W - v[t])
        z.append(q[t] @ W)
    return torch.stack(z), {"W": W}


def gated_deltanet(
    q: Tensor, k: Tensor, v: Tensor, gates: Tensors, params: Tensors, state: Tensors, tokens: Tensors, mini_batch: Size
) -> Result:
    """Gated DeltaNet (arXiv:2412.06464): W_t = α_t W_{t−1} − β_t k_tᵀ(k_t α_t W_{t−1} − v_t); the decay comes first."""
    W, z = state["W"], []
    for t in range(len(k)):
        W = gates["decay"][t] * W
        W = W - gates["lr"][t] * torch.outer(k[t], k[t] @ W - v[t])
        z.append(q[t] @ W)
    return torch.stack(z), {"W": W}


def kda(
    q: Tensor, k: Tensor, v: Tensor, gates: Tensors, params: Tensors, state: Tensors, tokens: Tensors, mini_batch: Size
) -> Result:
    """Kimi delta attention (arXiv:2510.26692): Gated DeltaNet with one α per key channel, diag(α_t) W_{t−1}."""
    W, z = state["W"], []
    for t in range(len(k)):
        W = gates["decay"][t][:, None] * W
        W = W - gates["lr"][t] * torch.outer(k[t], k[t] @ W - v[t])
        z.append(q[t] @ W)
    return torch.stack(z), {"W": W}


def longhorn(
    q: Tensor, k: Tensor, v: Tensor, gates: Tensors, params: Tensors, state: Tensors, tokens: Tensors, mini_batch: Size
) -> Result:
    """Longhorn (arXiv:2407.14207): W_t = argmin_W ½‖W − W_{t−1}‖² + (β_t/2)‖k_t W − v_t‖², whose exact solution is the
    delta rule with β' = β/(1 + β‖k‖²).
    """
    W, z = state["W"], []
    for t in range(len(k)):
        beta = gates["beta"][t] / (1 + gates["beta"][t] * (k[t] @ k[t]))
        W = W - beta * torch.outer(k[t], k[t] @ W - v[t])
        z.append(q[t] @ W)
    return torch.stack(z), {"W": W}


def momentum_deltanet(
    q: Tensor, k: Tensor, v: Tensor, gates: Tensors, params: Tensors, state: Tensors, tokens: Tensors, mini_batch: Size
) -> Result:
    """The momentum of Titans (arXiv:2501.00663) with a linear memory and no forgetting:
    S_t = η_t S_{t−1} + θ_t k_tᵀ(k_t W_{t−1} − v_t), W_t = W_{t−1} − S_t, S_0 = 0.
    """
    W, S, z = state["W"], torch.zeros_like(state["W"]), []
    for t in range(len(k)):
        S = gates["momentum"][t] * S + gates["lr"][t] * torch.outer(k[t], k[t] @ W - v[t])
        W = W - S
        z.append(q[t] @ W)
    return torch.stack(z), {"W": W}


def ln_l2_bwd(z: Tensor, target: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """∂/∂z of ½‖LN(z) − target‖²: u = γ∘(γx̂ + β − T), (u − mean(u) − x̂·mean(u∘x̂)) / σ."""
    return layer_norm_vjp(z, gamma, layer_norm(z, gamma, beta) - target)


def ttt_linear(
    q: Tensor, k: Tensor, v: Tensor, gates: Tensors, params: Tensors, state: Tensors, tokens: Tensors, mini_batch: Size
) -> Result:
    """TTT-Linear in its dual form (arXiv:2407.04620), with η[t,s] = τ_t·lr_s and η_b its last row:

    g = LNL2bwd(K W1 + b1; V − K), Z̄ = Q W1 + b1 − tril(η∘(QKᵀ + 1)) g, O = Q + LN(Z̄),
    W1' = W1 − (η_b∘K)ᵀ g, b1' = b1 − η_b g.
    """
    W, b, gamma, beta, z = state["W1"], state["b1"], params["gamma"], params["beta"], []
    for c in mini_batches(len(k), mini_batch):
        Q, K, eta = q[c], k[c], torch.outer(gates["tau"][c], gates["lr"][c])
        g = ln_l2_bwd(K @ W + b, v[c] - K, gamma, beta)
        z.append(Q + layer_norm(Q @ W + b - torch.tril(eta * (Q @ K.T + 1)) @ g, gamma, beta))
        W, b = W - (eta[-1, :, None] * K).T @ g, b - eta[-1] @ g
    return torch.cat(z), {"W1": W, "b1": b}


def ttt_mlp_gradients(K: Tensor, target: Tensor, W: Tensors, params: Tensors) -> tuple[Tensor, Tensor, Tensor]:
    """X2 = gelu(K W1 + b1), and the gradients by the rows of both layers' outputs:
    g2 = LNL2bwd(X2 W2 + b2; target), g1 = (g2 W2ᵀ)∘gelu'(K W1 + b1).
    """
    Z1 = K @ W["W1"] + W["b1"]
    X2 = gelu(Z1)
    g2 = ln_l2_bwd(X2 @ W["W2"] + W["b2"], target, params["gamma"], params["beta"])
    return X2, (g2 @ W["W2"].T) * gelu_derivative(Z1), g2


def ttt_mlp(
    q: Tensor, k: Tensor, v: Tensor, gates: Tensors, params: Tensors, state: Tensors, tokens: Tensors, mini_batch: Size
) -> Result:
    """TTT-MLP in its dual form (arXiv:2407.04620), with η[t,s] = τ_t·lr_s and η_b its last row:

    Z̄1 = Q W1 + b1 − tril(η∘(QKᵀ + 1)) g1, X̄2 = gelu(Z̄1), Z̄2 = X̄2 W2 + b2 − tril(η∘(X̄2 X2ᵀ + 1)) g2,
    O = Q + LN(Z̄2); W_l' = W_l − (η_b∘X_l)ᵀ g_l, b_l' = b_l − η_b g_l.
    """
    W, z = dict(state), []
    for c in mini_batches(len(k), mini_batch):
        Q, K, eta = q[c], k[c], torch.outer(gates["tau"][c], gates["lr"][c])
        X2, g1, g2 = ttt_mlp_gradients(K, v[c] - K, W, params)
        Q2 = gelu(Q @ W["W1"] + W["b1"] - torch.tril(eta * (Q @ K.T + 1)) @ g1)
        Z2 = Q2 @ W["W2"] + W["b2"] - torch.tril(eta * (Q2 @ X2.T + 1)) @ g2
        z.append(Q + layer_norm(Z2, params["gamma"], params["beta"]))
        W = {
            "W1": W["W1"] - (eta[-1, :, None] * K).T @ g1,
            "b1": W["b1"] - eta[-1] @ g1,
            "W2": W["W2"] - (eta[-1, :, None] * X2).T @ g2,
            "b2": W["b2"] - eta[-1] @ g2,
        }
    return torch.cat(z), W


def ttt_video(
    q: Tensor, k: Tensor, v: Tensor, gates: Tensors, params: Tensors, state: Tensors, tokens: Tensors, mini_batch: Size
) -> Result:
    """The TTT-MLP of video generation (arXiv:2504.05298): the target is v' = k + γ∘((v−k) − mean)/(std + 1e-8) + β, its
    std unbiased; W_end = W − Σ_s lr_s g_s; every token of a mini-batch reads W_end.
    """
    W, gamma, beta, z = dict(state), params["gamma"], params["beta"], []
    for c in mini_batches(len(k), mini_batch):
        Q, K, lr = q[c], k[c], gates["lr"][c]
        centred = (v[c] - K) - (v[c] - K).mean(-1, keepdim=True)
        std = torch.sqrt((centred**2).sum(-1, keepdim=True) / (K.shape[-1] - 1))
        X2, g1, g2 = ttt_mlp_gradients(K, gamma * centred / (std + 1e-8) + beta, W, params)
        W = {
            "W1": W["W1"] - (lr[:, None] * K).T @ g1,
            "b1": W["b1"] - lr @ g1,
            "W2": W["W2"] - (lr[:, None] * X2).T @ g2,
            "b2": W["b2"] - lr @ g2,
        }
        Z2 = gelu(Q @ W["W1"] + W["b1"]) @ W["W2"] + W["b2"]
        z.append(Q + layer_norm(Z2, gamma, beta))
    return torch.cat(z), W


def memory(x: Tensor, W: Tensors, params: Tensors) -> Tensor:
    """M(x) = x + LN(gelu(x W1) W2)."""
    return x + layer_norm(gelu(x @ W["W1"]) @ W["W2"], params["gamma"], params["beta"])


def memory_gradients(k: Tensor, W: Tensors, params: Tensors, dM: Tensor) -> Tensors:
    """Each token's gradients, [b, *shape], given those by M(k): g2 = LNbwd(dM), g1 = (g2 W2ᵀ)∘gelu'(k W1)."""
    Z1 = k @ W["W1"]
    X2 = gelu(Z1)
    g2 = layer_norm_vjp(X2 @ W["W2"], params["gamma"], dM)
    return {"W1": outer(k, (g2 @ W["W2"].T) * gelu_derivative(Z1)), "W2": outer(X2, g2)}


def titans(
    q: Tensor, k: Tensor, v: Tensor, gates: Tensors, params: Tensors, state: Tensors, tokens: Tensors, mini_batch: Size
) -> Result:
    """Titans (arXiv:2501.00663), ℓ = ‖M(k) − v‖², gradients at the mini-batch's start:
    S_t = η_t S_{t−1} + θ_t ∇ℓ_t, W_t = (1 − α_t) W_{t−1} − S_t, z_t = M(q_t; W_t). The gate `decay` is 1 − α.
    """
    W, S, z = dict(state), {n: torch.zeros_like(w) for n, w in state.items()}, []
    for c in mini_batches(len(k), mini_batch):
        K, V = k[c], v[c]
        g = memory_gradients(K, W, params, 2 * (memory(K, W, params) - V))
        for s, t in enumerate(range(c.start, c.stop)):
            S = {n: gates["momentum"][t] * S[n] + gates["lr"][t] * g[n][s] for n in W}
            W = {n: gates["decay"][t] * W[n] - S[n] for n in W}
            z.append(memory(q[t], W, params))
    return torch.stack(z), W


def moneta(
    q: Tensor, k: Tensor, v: Tensor, gates: Tensors, params: Tensors, state: Tensors, tokens: Tensors, mini_batch: Size
) -> Result:
    """Moneta (MIRAS, arXiv:2504.13173) with p = 3 and q = 4: ℓ = Σ|M(k) − v|³, A_t = α_t A_{t−1} − η_t ∇ℓ_t, and
    W = A / ‖A‖_q^{q−2} at the end of a mini-batch, which reads and differentiates the W it starts with. A_0 = W_0.
    """
    W, A, z = dict(state), dict(state), []
    for c in mini_batches(len(k), mini_batch):
        error = memory(k[c], W, params) - v[c]
        g = memory_gradients(k[c], W, params, 3 * error.abs() * error)
        z.append(memory(q[c], W, params))
        for s, t in enumerate(range(c.start, c.stop)):
            A = {n: gates["decay"][t] * A[n] - gates["lr"][t] * g[n][s] for n in W}
        W = {n: a / (a**4).sum() ** (2 / 4) for n, a in A.items()}
    return torch.cat(z), W


def yaad(
    q: Tensor, k: Tensor, v: Tensor, gates: Tensors, params: Tensors, state: Tensors, tokens: Tensors, mini_batch: Size
) -> Result:
    """Yaad (MIRAS, arXiv:2504.13173): with r = M(k) − v, ∂ℓ/∂M = r where ‖r‖ ≤ δ_t and δ_t r/‖r‖ beyond, which is
    Huber's ½‖r‖² and δ_t(‖r‖ − δ_t/2); W_t = α_t W_{t−1} − η_t ∇ℓ_t, gradients at the mini-batch's start.
    """
    W, z = dict(state), []
    for c in mini_batches(len(k), mini_batch):
        r, delta = memory(k[c], W, params) - v[c], gates["delta"][c, None]
        n = torch.sqrt((r**2).sum(-1, keepdim=True))
        g = memory_gradients(k[c], W, params, torch.where(n <= delta, r, delta * r / n))
        for s, t in enumerate(range(c.start, c.stop)):
            W = {m: gates["decay"][t] * W[m] - gates["lr"][t] * g[m][s] for m in W}
            z.append(memory(q[t], W, params))
    return torch.stack(z), W


def newton_schulz(S: Tensor) -> Tensor:
    """X = S/(‖S‖_F + 1e-7), then X ← aX + b(XXᵀ)X + c(XXᵀ)²X for each (a, b, c). Transposing a tall S first, as
    implementations do, gives the same matrix.
    """
    X = S / (torch.sqrt((S**2).sum()) + 1e-7)
    for a, b, c in NS5:
        XX = X @ X.T
        X = a * X + (b * XX + c * XX @ XX) @ X
    return X


def lact(
    q: Tensor, k: Tensor, v: Tensor, gates: Tensors, params: Tensors, state: Tensors, tokens: Tensors, mini_batch: Size
) -> Result:
    """LaCT (arXiv:2505.23884), ℓ = −f(k)·v with f(x) = (silu(x W0)∘(x W2)) W1, h = silu(gate)∘hid:

    dh = v W1ᵀ; dhid = dh∘silu(gate); dgate = silu'(gate)∘dh∘hid; the negative gradients are
    Δ1 = hᵀ(lr1∘v), Δ0 = kᵀ(lr0∘dgate), Δ2 = kᵀ(lr2∘dhid). A chunk first reads its weights, then
    S = Δ + m̄ S_prev, W ← W + NS5(S), W ← W/(‖W‖ + 1e-5)·‖W_init‖, with the norms of each output's input weights.
    """
    W, S, z = dict(state), {n: torch.zeros_like(w) for n, w in state.items()}, []
    norms = {n: torch.sqrt((w**2).sum(0)) for n, w in state.items()}
    for c in mini_batches(len(k), mini_batch):
        Q, K, V = q[c], k[c], v[c]
        z.append((silu(Q @ W["W0"]) * (Q @ W["W2"])) @ W["W1"])
        gate, hid, dh = K @ W["W0"], K @ W["W2"], V @ W["W1"].T
        delta = {
            "W0": K.T @ (gates["lr0"][c, None] * silu_derivative(gate) * dh * hid),
            "W1": (silu(gate) * hid).T @ (gates["lr1"][c, None] * V),
            "W2": K.T @ (gates["lr2"][c, None] * dh * silu(gate)),
        }
        S = {n: delta[n] + gates["momentum"][c].mean() * S[n] for n in W}
        W = {n: W[n] + newton_schulz(S[n]) for n in W}
        W = {n: w / (torch.sqrt((w**2).sum(0)) + 1e-5) * norms[n] for n, w in W.items()}
    return torch.cat(z), W


def mttt(
    q: Tensor, k: Tensor, v: Tensor, gates: Tensors, params: Tensors, state: Tensors, tokens: Tensors, mini_batch: Size
) -> Result:
    """MTTT (arXiv:2310.13807) with a linear encoder: two steps of gradient descent on all tokens of a mini-batch, on
    ℓ = ½ mean_j (LN(k W G + g_bias) − x)_j²; every token reads the last W. By the encoder's output the gradient is
    LNL2bwd(k W G + g_bias; x) Gᵀ/M, for the M channels of x.
    """
    W, G, x, z = state["W"], params["decoder"], tokens["x"], []
    for c in mini_batches(len(k), mini_batch):
        for _ in range(2):
            y = k[c] @ W @ G + params["g_bias"]
            g = ln_l2_bwd(y, x[c], params["gamma"], params["beta"]) @ G.T / x.shape[-1]
            W = W - k[c].T @ (gates["lr"][c, None] * g)
        z.append(q[c] @ W)
    return torch.cat(z), {"W": W}


def vittt(
    q: Tensor, k: Tensor, v: Tensor, gates: Tensors, params: Tensors, state: Tensors, tokens: Tensors, mini_batch: Size
) -> Result:
    """ViT³ (arXiv:2512.01643), ℓ = −f(k)·v with f(x) = (x W1)∘silu(x W2): with z1 = k W1, z2 = k W2 and e = −lr·v,

    g1 = kᵀ(e∘silu(z2)), g2 = kᵀ(e∘z1∘silu'(z2)); g ← g/(‖g‖ + 1) per output column, W ← W − g; all read the new W.
    """
    W, z = dict(state), []
    for c in mini_batches(len(k), mini_batch):
        z1, z2, e = k[c] @ W["W1"], k[c] @ W["W2"], -gates["lr"][c, None] * v[c]
        g = {"W1": k[c].T @ (e * silu(z2)), "W2": k[c].T @ (e * z1 * silu_derivative(z2))}
        W = {n: W[n] - g[n] / (torch.sqrt((g[n] ** 2).sum(0)) + 1) for n in W}
        z.append((q[c] @ W["W1"]) * silu(q[c] @ W["W2"]))
    return torch.cat(z), W


TRANSCRIPTIONS: dict[str, Transcription] = {
    "LinearAttention": linear_attention,
    "RetNet": retnet,
    "Mamba2": mamba2,
    "GLA": gla,
    "DeltaNet": deltanet,
    "GatedDeltaNet": gated_deltanet,
    "KDA": kda,
    "Longhorn": longhorn,
    "MomentumDeltaNet": momentum_deltanet,
    "TTTLinear": ttt_linear,
    "TTTMLP": ttt_mlp,
    "TTTVideo": ttt_video,
    "Titans": titans,
    "LaCT": lact,
    "MTTT": mttt,
    "Moneta": moneta,
    "Yaad": yaad,
    "ViTTT": vittt,
}
