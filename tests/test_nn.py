"""`tttc.nn.TTT` against a transcription of the paper's layer, and against itself at every split of a
sequence."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tttc
from tests.helpers import LIBRARY
from tttc.errors import DeclarationError, ShapeError, StateMismatch
from tttc.library import TTTMLP, LinearAttention, TTTLinear
from tttc.nn import TTT, Cache
from tttc.nn.convolution import CausalConvolution
from tttc.nn.rotation import rotated
from tttc.verification.comparison import relative_error

DOUBLE = torch.float64
# float64 has 1.1e-16 per rounding; values are of order 1 and at most a few thousand roundings add up in
# another order.
EXACT = dict(rtol=0.0, atol=1e-10)


class Gated(tttc.Variant):
    """Every way to make a gate, a value of another width and a further token."""

    mini_batch = 4
    v = tttc.token("E")
    target = tttc.token("E")
    W = tttc.state("D", "E", init=tttc.normal(0.3))
    keep = tttc.gate("keep", per="channel", axis="E", activation="tanh", scale=0.5)
    plus = tttc.gate("plus", activation="softplus")
    power = tttc.gate("power", activation="exp", scale="1/sqrt(D)")
    bare = tttc.gate("bare", activation="none")
    early = tttc.gate("early", per="channel", axis="E", by="position")

    def learner(self, x):
        return (x @ self.W) * self.keep * self.plus + self.power

    def loss(self, k, v):
        return 0.5 * tttc.sum((self.learner(k) - v - self.bare * self.early * self.target) ** 2)

    update = tttc.sgd(lr=tttc.gate("lr", scale="1/D"))


class WholeSequence(tttc.Variant):
    """One mini-batch for the whole sequence."""

    mini_batch = "all"
    W = tttc.state("D", "D", init=tttc.normal(0.3))

    def learner(self, x):
        return x @ self.W

    def loss(self, k, v):
        return 0.5 * tttc.sum((self.learner(k) - v) ** 2)

    update = tttc.sgd(lr=tttc.gate("lr", scale="1/D"), read_scale=tttc.gate("tau", by="position"))


VARIANTS = [TTTLinear, TTTMLP, LinearAttention, Gated, WholeSequence]


def made(variant: type[tttc.Variant], hidden_size: int = 16, num_heads: int = 2, seed: int = 0, **options) -> TTT:
    """A float64 layer whose parameters all differ from their initial values, so that none hides behind a 0 or
    a 1."""
    torch.manual_seed(seed)
    layer = TTT(variant, hidden_size, num_heads, dtype=DOUBLE, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return layer


def inputs(B: int, T: int, hidden_size: int = 16, seed: int = 1) -> Tensor:
    return torch.randn(B, T, hidden_size, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


# ---- the paper's layer, transcribed ----


def layer_norm_gradient(z: Tensor, target: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """d/dz of 1/2 |LN(z) - target|^2, by hand."""
    mean = z.mean(-1, keepdim=True)
    sigma = ((z - mean).square().mean(-1, keepdim=True) + 1e-6).sqrt()
    normal = (z - mean) / sigma
    u = gamma * (gamma * normal + beta - target)
    return (u - u.mean(-1, keepdim=True) - normal * (u * normal).mean(-1, keepdim=True)) / sigma


def layer_norm(z: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    return F.layer_norm(z, z.shape[-1:], eps=1e-6) * gamma + beta


def gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def gelu_slope(x: Tensor) -> Tensor:
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    slope = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x**2)
    return 0.5 * (1 + inner.tanh()) + 0.5 * x * (1 - inner.tanh() ** 2) * slope


def turned(x: Tensor, mini_batch: int) -> Tensor:
    """RoPE on [T, D] by complex numbers; the angles are float32 tables, as in the reference
    implementation."""
    T, D = x.shape
    frequencies = 1.0 / (10000.0 ** (torch.arange(0, D, 2).float() / D))
    angles = torch.outer((torch.arange(T) % mini_batch).float(), frequencies)
    turns = torch.complex(angles.cos().double(), angles.sin().double())
    return torch.view_as_real(torch.view_as_complex(x.reshape(T, D // 2, 2).contiguous()) * turns).flatten(1)


def linear_chunk(W: dict[str, Tensor], q: Tensor, k: Tensor, v: Tensor, eta: Tensor, gamma: Tensor, beta: Tensor):
    g = layer_norm_gradient(k @ W["W1"] + W["b1"], v - k, gamma, beta)
    z = q @ W["W1"] + W["b1"] - (eta * (q @ k.T + 1)) @ g
    last = eta[-1]
    return q + layer_norm(z, gamma, beta), {
        "W1": W["W1"] - (last[:, None] * k).T @ g,
        "b1": W["b1"] - last @ g,
    }


def mlp_chunk(W: dict[str, Tensor], q: Tensor, k: Tensor, v: Tensor, eta: Tensor, gamma: Tensor, beta: Tensor):
    z1 = k @ W["W1"] + W["b1"]
    x2 = gelu(z1)
    g2 = layer_norm_gradient(x2 @ W["W2"] + W["b2"], v - k, gamma, beta)
    g1 = (g2 @ W["W2"].T) * gelu_slope(z1)
    read2 = gelu(q @ W["W1"] + W["b1"] - (eta * (q @ k.T + 1)) @ g1)
    z = read2 @ W["W2"] + W["b2"] - (eta * (read2 @ x2.T + 1)) @ g2
    last = eta[-1]
    return q + layer_norm(z, gamma, beta), {
        "W1": W["W1"] - (last[:, None] * k).T @ g1,
        "b1": W["b1"] - last @ g1,
        "W2": W["W2"] - (last[:, None] * x2).T @ g2,
        "b2": W["b2"] - last @ g2,
    }


def paper_layer(layer: TTT, x: Tensor, base_rate: float, chunk_of, mini_batch: int = 16) -> Tensor:
    """arXiv:2407.04620 in the dual form, one batch element and head at a time, from the layer's
    `state_dict()` alone."""
    weights = layer.state_dict()
    H, D = layer.num_heads, layer.hidden_size // layer.num_heads
    rows = []
    for sequence in x:
        heads = []
        for h in range(H):
            own = slice(h * D, (h + 1) * D)
            if "conv_q.weight" in weights:
                shared = F.pad((sequence @ weights["q_proj.weight"].T).T[None], (3, 0))
                q, k = (
                    F.conv1d(shared, weights[f"conv_{n}.weight"], weights[f"conv_{n}.bias"], groups=H * D)[0].T[:, own]
                    for n in "qk"
                )
            else:
                q, k = (sequence @ weights[f"{n}_proj.weight"][own].T for n in "qk")
            q, k = turned(q, mini_batch), turned(k, mini_batch)
            v = sequence @ weights["v_proj.weight"][own].T
            lr = base_rate / D * torch.sigmoid(sequence @ weights["gates.lr.weight"][h] + weights["gates.lr.bias"][h])
            W = {name.split(".")[1]: w[h] for name, w in weights.items() if name.startswith("initial_state.")}
            gamma, beta = weights["params.gamma"][h], weights["params.beta"][h]
            outputs = []
            for first in range(0, len(sequence), mini_batch):
                at = slice(first, first + mini_batch)
                count = len(lr[at])
                tau = torch.clamp(
                    1 / torch.arange(1, count + 1, dtype=DOUBLE) + weights["gates.tau.learned"][:count], min=0
                )
                eta = torch.tril(tau[:, None] * lr[at][None, :])
                z, W = chunk_of(W, q[at], k[at], v[at], eta, gamma, beta)
                outputs.append(z)
            heads.append(torch.cat(outputs))
        y = F.layer_norm(
            torch.cat(heads, 1), (H * D,), weights["post_norm.weight"], weights["post_norm.bias"], eps=1e-6
        )
        if "g_proj.weight" in weights:
            y = y * gelu(sequence @ weights["g_proj.weight"].T)
        rows.append(y @ weights["o_proj.weight"].T)
    return torch.stack(rows)


@pytest.mark.parametrize("options", [{}, {"conv_kernel": 4, "output_gate": True}], ids=["transformer", "mamba"])
@pytest.mark.parametrize(
    ("variant", "base_rate", "chunk_of"),
    [(TTTLinear, 1.0, linear_chunk), (TTTMLP, 0.1, mlp_chunk)],
    ids=["linear", "mlp"],
)
def test_equals_the_papers_layer(variant, base_rate, chunk_of, options):
    layer = made(variant, **options)
    x = inputs(B=2, T=37)  # two mini-batches of 16 and a ragged one
    torch.testing.assert_close(layer(x), paper_layer(layer, x, base_rate, chunk_of), **EXACT)


# ---- shapes and continuation ----


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("T", [0, 1, 21])
def test_shapes(variant, T):
    layer = TTT(variant, 16, 2)
    y, cache = layer(torch.randn(3, T, 16), return_state=True)
    assert y.shape == (3, T, 16)
    assert y.dtype == torch.float32
    assert cache.position == T
    for name, start in layer.initial_state.items():
        assert cache.state[name].shape == (3, *start.shape)


def test_value_width_of_its_own():
    layer = made(Gated, dims={"E": 6})
    assert layer.v_proj.weight.shape == (12, 16)
    assert layer.token_proj["target"].weight.shape == (12, 16)
    assert layer.o_proj.weight.shape == (16, 12)
    assert layer(inputs(2, 9)).shape == (2, 9, 16)


@pytest.mark.parametrize("options", [{}, {"conv_kernel": 4, "output_gate": True}, {"rope": False, "post_norm": False}])
@pytest.mark.parametrize(
    "variant", [TTTLinear.replace(mini_batch=4), TTTMLP.replace(mini_batch=4), LinearAttention, Gated]
)
def test_every_split_continues_the_sequence(variant, options):
    T = 11  # two mini-batches of 4 and an open one
    layer, x = made(variant, **options), inputs(2, T)
    with torch.no_grad():
        whole = layer(x)
        for split in range(T + 1):
            head, cache = layer(x[:, :split], return_state=True)
            tail = layer(x[:, split:], state=cache)
            torch.testing.assert_close(torch.cat([head, tail], 1), whole, **EXACT)


@pytest.mark.parametrize("variant", VARIANTS)
def test_token_by_token_decoding_after_a_prefill(variant):
    layer, x = made(variant, conv_kernel=4), inputs(2, 21)
    with torch.no_grad():
        whole = layer(x)
        y, cache = layer(x[:, :5], return_state=True)
        rows = [y]
        for t in range(5, 21):
            y, cache = layer(x[:, t : t + 1], state=cache, return_state=True)
            rows.append(y)
    assert cache.position == 21
    torch.testing.assert_close(torch.cat(rows, 1), whole, **EXACT)


@pytest.mark.parametrize("variant", VARIANTS)
def test_causal_to_the_last_bit(variant):
    layer, x = made(variant, conv_kernel=4), inputs(1, 21)
    other = x.clone()
    other[:, 13:] += 1.0
    with torch.no_grad():
        assert torch.equal(layer(x)[:, :13], layer(other)[:, :13])


# ---- parameters ----


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("options", [{}, {"conv_kernel": 3, "output_gate": True}])
def test_a_gradient_reaches_every_parameter(variant, options):
    layer, x = made(variant, **options), inputs(2, 21)
    layer(x).square().sum().backward()
    without = [name for name, p in layer.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_the_gradient_flows_through_a_continued_sequence():
    layer, x = made(TTTLinear), inputs(1, 21)
    layer(x).square().sum().backward()
    whole = {name: p.grad for name, p in layer.named_parameters()}
    layer.zero_grad()
    head, cache = layer(x[:, :7], return_state=True)
    torch.cat([head, layer(x[:, 7:], state=cache)], 1).square().sum().backward()
    for name, p in layer.named_parameters():
        torch.testing.assert_close(p.grad, whole[name], **EXACT, msg=lambda text, name=name: f"{name}: {text}")


def test_a_detached_state_keeps_its_values_and_ends_the_gradient():
    layer, x = made(TTTLinear, conv_kernel=4), inputs(1, 21).requires_grad_()
    _, cache = layer(x[:, :7], return_state=True)
    attached, detached = layer(x[:, 7:], state=cache), layer(x[:, 7:], state=cache.detach())
    assert torch.equal(attached, detached)
    (gradient,) = torch.autograd.grad(detached.sum(), x)
    assert not gradient[:, :7].any()
    assert gradient[:, 7:].all()


def test_names_in_the_state_dict():
    layer = TTT(TTTMLP, 16, 2, conv_kernel=4, output_gate=True)
    assert {name: tuple(p.shape) for name, p in layer.state_dict().items()} == {
        "q_proj.weight": (16, 16),
        "v_proj.weight": (16, 16),
        "conv_q.weight": (16, 1, 4),
        "conv_q.bias": (16,),
        "conv_k.weight": (16, 1, 4),
        "conv_k.bias": (16,),
        "gates.lr.weight": (2, 16),
        "gates.lr.bias": (2,),
        "gates.tau.learned": (16,),
        "params.gamma": (2, 8),
        "params.beta": (2, 8),
        "initial_state.W1": (2, 8, 32),
        "initial_state.b1": (2, 32),
        "initial_state.W2": (2, 32, 8),
        "initial_state.b2": (2, 8),
        "post_norm.weight": (16,),
        "post_norm.bias": (16,),
        "g_proj.weight": (16, 16),
        "o_proj.weight": (16, 16),
    }


def test_initial_values():
    torch.manual_seed(0)
    layer = TTT(TTTLinear, 256, 4)
    # 65536 (16384) draws: the sample's deviation is within 1.5 % (2 %) of 0.02 with more than five standard
    # errors to spare.
    assert layer.q_proj.weight.std().item() == pytest.approx(0.02, rel=0.015)
    assert layer.initial_state["W1"].std().item() == pytest.approx(0.02, rel=0.03)
    assert not torch.equal(layer.initial_state["W1"][0], layer.initial_state["W1"][1])
    assert layer.params["gamma"].eq(1.0).all()
    for zero in ("gates.lr.bias", "gates.tau.learned", "params.beta", "initial_state.b1"):
        assert not layer.state_dict()[zero].any(), zero
    torch.manual_seed(0)
    again = TTT(TTTLinear, 256, 4)
    assert all(torch.equal(p, q) for p, q in zip(layer.parameters(), again.parameters(), strict=True))


def test_made_on_the_meta_device():
    layer = TTT(TTTMLP, 16, 2, conv_kernel=4, device="meta")
    assert all(p.is_meta for p in layer.parameters())
    filled = layer.to_empty(device="cpu")
    filled.reset_parameters()
    assert filled(torch.randn(1, 5, 16)).isfinite().all()


def test_copies_and_checkpoints_compute_the_same():
    layer, x = made(TTTMLP, output_gate=True), inputs(2, 9)
    with torch.no_grad():
        expected = layer(x)
        assert torch.equal(copy.deepcopy(layer)(x), expected)
        assert torch.equal(pickle.loads(pickle.dumps(layer))(x), expected)
        fresh = TTT(TTTMLP, 16, 2, output_gate=True, dtype=DOUBLE)
        fresh.load_state_dict(layer.state_dict())
        assert torch.equal(fresh(x), expected)


@pytest.mark.parametrize("variant", [TTTLinear, TTTMLP])
def test_bfloat16_and_autocast(variant):
    layer, x = made(variant, conv_kernel=4, output_gate=True), inputs(2, 37)
    exact = layer(x)
    half = copy.deepcopy(layer).to(torch.bfloat16)
    single = copy.deepcopy(layer).to(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed, cache = single(x.float(), return_state=True)
    assert cache.state["W1"].dtype == torch.float32
    for y in (half(x.bfloat16()), mixed):
        assert y.dtype == torch.bfloat16
        # bfloat16 has 3.9e-3 per rounding; about ten of them follow each other from x to y.
        assert (y.double() - exact).norm() < 0.04 * exact.norm()


def test_follows_to():
    layer, x = made(TTTLinear), inputs(1, 20)
    exact = layer(x)
    single = copy.deepcopy(layer).to(torch.float32)(x.float())
    assert single.dtype == torch.float32
    # float32 has 6e-8 per rounding; the post norm divides by a deviation of order 1.
    torch.testing.assert_close(single.double(), exact, rtol=0, atol=2e-5)


# ---- gates, rotation, convolution ----


def test_gates_from_the_hidden_states():
    layer, x = made(Gated, dims={"E": 6}), inputs(2, 9)
    D = 8
    expected = {
        "keep": lambda s: 0.5 * s.tanh(),
        "plus": lambda s: (1 + s.exp()).log(),
        "power": lambda s: s.exp() / math.sqrt(D),
        "bare": lambda s: s,
        "lr": lambda s: 1 / (1 + (-s).exp()) / D,
    }
    for name, formula in expected.items():
        gate = layer.gates[name]
        scores = torch.einsum("btc,h...c->bth...", x, gate.weight) + gate.bias
        assert scores.shape == ((2, 9, 2, 6) if name == "keep" else (2, 9, 2))
        torch.testing.assert_close(gate(x, torch.arange(9)), formula(scores), **EXACT)


def test_gates_by_position():
    layer, x = made(Gated, dims={"E": 6}), inputs(2, 3)
    gate = layer.gates["early"]
    with torch.no_grad():
        gate.learned[0, 0] = -5.0
    found = gate(x, torch.tensor([3, 0, 1]))
    assert found.shape == (2, 3, 2, 6)
    for t, i in enumerate((4, 1, 2)):
        expected = torch.clamp(1 / i + gate.learned[i - 1], min=0)
        assert torch.equal(found[:, t], expected.expand(2, 2, 6))
    assert found[0, 1, 0, 0] == 0.0


def test_gates_by_position_of_a_whole_sequence_have_nothing_to_learn():
    layer = TTT(WholeSequence, 16, 2)
    assert not list(layer.gates["tau"].parameters())
    found = layer.gates["tau"](torch.zeros(1, 3, 16), torch.tensor([0, 1, 9]))
    torch.testing.assert_close(found[0, :, 1], torch.tensor([1.0, 0.5, 0.1]))


def test_rotation_depends_on_distance_alone():
    q, k = inputs(1, 1, 8).view(1, 1, 1, 8), inputs(1, 1, 8, seed=2).view(1, 1, 1, 8)

    def score(m: int, n: int) -> float:
        return float((rotated(q, torch.tensor([m]), 100.0) * rotated(k, torch.tensor([n]), 100.0)).sum())

    # Angles are float32: 1e-7 each, on sums of eight products of order 1.
    assert score(5, 2) == pytest.approx(score(13, 10), abs=1e-5)
    assert score(5, 2) != pytest.approx(score(5, 3), abs=1e-3)
    assert torch.equal(rotated(q, torch.tensor([0]), 100.0), q)


def test_rotation_restarts_with_the_mini_batch():
    x = inputs(1, 12)
    assert made(Gated)._positions(x, None).tolist() == [0, 1, 2, 3] * 3
    assert made(WholeSequence)._positions(x, None).tolist() == list(range(12))


@pytest.mark.parametrize("kernel", [1, 2, 4])
def test_convolution_is_conv1d_padded_on_the_left(kernel):
    torch.manual_seed(0)
    convolution = CausalConvolution(6, kernel, dtype=DOUBLE)
    convolution.reset_parameters()
    x = inputs(2, 9, 6)
    padded = F.pad(x, (0, 0, kernel - 1, 0))
    expected = F.conv1d(padded.mT, convolution.weight, convolution.bias, groups=6).mT
    torch.testing.assert_close(convolution(padded), expected, **EXACT)


# ---- errors ----


class NeedsP(tttc.Variant):
    """A dim without a default."""

    W = tttc.state("D", "P")
    U = tttc.state("P", "D")

    def learner(self, x):
        return (x @ self.W) @ self.U

    def loss(self, k, v):
        return 0.5 * tttc.sum((self.learner(k) - v) ** 2)


class KeysOfTheirOwn(tttc.Variant):
    """k over another axis than q."""

    k = tttc.token("P")
    W = tttc.state("P", "D")

    def learner(self, x):
        return x @ self.W

    def loss(self, k, v):
        return 0.5 * tttc.sum((self.learner(k) - v) ** 2)

    def output(self, q):
        return q @ self.W.T @ self.W


class UnknownActivation(LinearAttention):
    update = tttc.sgd(lr=tttc.gate("lr", activation="softmaxx"))


class UnknownSource(LinearAttention):
    update = tttc.sgd(lr=tttc.gate("lr", by="magic"))


@pytest.mark.parametrize(
    ("make", "error", "parts"),
    [
        (
            lambda: TTT(TTTLinear, 100, 3),
            ShapeError,
            ["`TTTLinear`", "hidden_size 100", "num_heads 3", "2, 4"],
        ),
        (lambda: TTT(TTTLinear, 64, 0), ShapeError, ["num_heads is 0", "positive int"]),
        (lambda: TTT(TTTLinear, 30, 2), ShapeError, ["`q` has the shape [15]", "rope=False"]),
        (lambda: TTT(TTTLinear, 64, 2, dims={"D": 16}), ShapeError, ["D = 16", "64 / 2 = 32"]),
        (lambda: TTT(TTTLinear, 64, 2, dims={"F": 16}), ShapeError, ["gives F", "Its dims are D"]),
        (lambda: TTT(NeedsP, 64, 2), ShapeError, ["size of P is not known", 'dims={"P": ...}']),
        (lambda: TTT(NeedsP, 64, 2, dims={"P": 0}), ShapeError, ["P is 0", "positive int"]),
        (lambda: TTT(TTTLinear, 64, 2, conv_kernel=0), ShapeError, ["conv_kernel is 0"]),
        (
            lambda: TTT(KeysOfTheirOwn, 64, 2, dims={"P": 8}, conv_kernel=4),
            ShapeError,
            ["q is [32] and k [8]"],
        ),
        (
            lambda: TTT(UnknownActivation, 64, 2),
            DeclarationError,
            ["'softmaxx'", "sigmoid, softplus", "test_nn.py"],
        ),
        (lambda: TTT(UnknownSource, 64, 2), DeclarationError, ["'magic'", 'by="position"']),
        (lambda: TTT("TTTLinear", 64, 2), DeclarationError, ["subclass of tttc.Variant", "'TTTLinear'"]),
    ],
)
def test_errors_at_construction(make, error, parts):
    with pytest.raises(error) as caught:
        make()
    for part in parts:
        assert part in str(caught.value)


def test_all_problems_at_once():
    with pytest.raises(ShapeError, match="3 problems") as caught:
        TTT(TTTLinear, 30, 2, dims={"F": 4, "D": 3}, conv_kernel=0, rope=False)
    assert "conv_kernel is 0" in str(caught.value)


@pytest.mark.parametrize("shape", [(2, 5, 15), (5, 16), (2, 5, 2, 8)])
def test_wrong_input_shape(shape):
    with pytest.raises(ShapeError) as caught:
        TTT(TTTLinear, 16, 2)(torch.zeros(shape))
    assert str(list(shape)) in str(caught.value)
    assert "[B, T, 16]" in str(caught.value)


def test_wrong_dtype():
    layer, x = TTT(TTTLinear, 16, 2), torch.zeros(1, 5, 16)
    with pytest.raises(ShapeError, match=r"x is torch\.float64 on cpu, the parameters are torch\.float32 on cpu"):
        layer(x.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x.bfloat16()).dtype == torch.bfloat16


def test_wrong_state():
    layer, x = TTT(TTTLinear, 16, 2), torch.randn(2, 5, 16)
    _, cache = layer(x, return_state=True)
    with pytest.raises(StateMismatch, match=r"\[2, 2, 8, 8\], expected \[3, 2, 8, 8\]"):
        layer(torch.randn(3, 5, 16), state=cache)
    with pytest.raises(StateMismatch, match=r"is a dict, expected a tttc\.nn\.Cache"):
        layer(x, state=dict(layer.initial_state))
    with pytest.raises(StateMismatch, match="conv_kernel=None, this one has conv_kernel=4"):
        TTT(TTTLinear, 16, 2, conv_kernel=4)(x, state=cache)
    assert isinstance(cache, Cache)


def test_an_init_of_the_wrong_shape():
    class Odd(TTTLinear):
        b1 = tttc.state("D", init=lambda shape, generator: torch.zeros(3))

    with pytest.raises(ShapeError, match=r"init of `b1` returned the shape \[3\], expected \[8\]"):
        TTT(Odd, 16, 2)


def test_repr_says_what_the_layer_is():
    assert "TTTMLP, hidden_size=16, num_heads=2, D=8, F=32, mini_batch=16, rope_theta=10000" in repr(TTT(TTTMLP, 16, 2))


# -- every ready declaration --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(LIBRARY))
def test_every_ready_declaration_is_a_module(name):
    """It runs, its gradients are finite, and where it is causal it continues at any token (float64, 1e-11)."""
    variant = LIBRARY[name]
    variant = variant if variant.mini_batch == "all" else variant.replace(mini_batch=4)
    module = tttc.nn.TTT(variant, 16, 2, dims={"M": 8} if name == "MTTT" else {}, qk_norm=True, dtype=torch.float64)
    x = torch.randn(1, 11, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = module(x)
    y.square().sum().backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in module.parameters())
    if variant.read != "end":
        first, cache = module(x[:, :5], return_state=True)
        assert relative_error(torch.cat([first, module(x[:, 5:], cache)], 1), y) <= 1e-11
