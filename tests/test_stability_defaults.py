"""What a variant needs to be stable is part of its declaration, and `tttc.nn.TTT` follows it."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tttc
from tests.helpers import LIBRARY, dims_of
from tttc.declare.read import signature
from tttc.declare.specs import GateSpec
from tttc.errors import DeclarationError, NonFinite
from tttc.library import DeltaNet, GatedDeltaNet, TTTLinear
from tttc.runtime.stability import UnstableInnerLoop

STEPS, HIDDEN, TOKENS = 300, 64, 128
NORMALISED = {
    *("DeltaNet", "GatedDeltaNet", "KDA", "MomentumDeltaNet"),
    *("Titans", "Yaad", "Moneta", "TTTVideo", "LaCT", "GatedThreeLayer"),
}  # as their papers have it, and one that is in none


class Gated(tttc.Variant):
    """A gate of each kind, none of which begins where its bias is 0."""

    mini_batch = 4
    W = tttc.state("D", "D")
    plus = tttc.gate("plus", activation="softplus", scale=0.5, init=0.1)
    signed = tttc.gate("signed", activation="tanh", scale=2.0, init=-1.5)
    power = tttc.gate("power", activation="exp", scale="1/D", init=3.0)
    bare = tttc.gate("bare", activation="none", init=-4.0)
    near = tttc.gate("near", low=0.9, scale=0.1, init=0.99)

    def loss(self, k, v):
        return 0.5 * tttc.sum((k @ self.W - v) ** 2)

    def output(self, q):
        return (self.plus + self.signed + self.power + self.bare + self.near) * (q @ self.W)

    update = tttc.sgd(lr=tttc.gate("lr", scale="1/D", init=0.01), decay=tttc.gate("decay", per="channel", init=0.97))


def module(variant, **options):
    torch.manual_seed(0)
    return tttc.nn.TTT(variant, 16, 2, dims={"M": 8} if "M" in signature(variant).dims else {}, **options)


# -- normalised keys ---------------------------------------------------------------------------------------------------


def test_the_declaration_says_whether_keys_are_normalised():
    assert {n for n, v in LIBRARY.items() if v.qk_norm} == NORMALISED
    assert all(module(v).qk_norm == v.qk_norm for v in LIBRARY.values())
    assert "qk_norm=True" in repr(module(DeltaNet))


def test_the_layer_may_be_told_otherwise():
    x = torch.randn(1, 6, 16)
    layers = [module(DeltaNet, qk_norm=given, backend="torch") for given in (None, True, False)]
    found = [layer(x) for layer in layers]
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[0], found[2])
    plain = module(DeltaNet.replace(qk_norm=False), backend="torch")
    assert torch.equal(plain(x), found[2])


def test_steps_on_normalised_keys_cannot_overshoot():
    """Training may make the projections as large as it likes: that is what diverged without it."""
    x = torch.randn(1, 64, 16)

    def output(**options):
        layer = module(GatedDeltaNet, check=True, backend="torch", post_norm=False, **options)
        with torch.no_grad():
            layer.k_proj.weight.mul_(100.0)
            return layer(x)

    assert output().abs().max() < 1.0
    with pytest.warns(UnstableInnerLoop):
        diverged = output(qk_norm=False)
    assert not diverged.abs().max() < 1e20


def test_it_changes_nothing_of_what_is_compiled():
    texts = [
        tttc.compile(DeltaNet.replace(qk_norm=given), {"D": 3}, backend="torch").stages["adjoint"].text
        for given in (True, False)
    ]
    assert texts[0] == texts[1]


def test_a_setting_that_is_no_choice_is_refused():
    with pytest.raises(DeclarationError, match=r"qk_norm is 'l1'\.[\s\S]*must be True"):
        tttc.compile(DeltaNet.replace(qk_norm="l1"), {"D": 3})


# -- where gates begin -------------------------------------------------------------------------------------------------


def test_gates_begin_where_they_are_declared_to():
    layer = module(Gated, dtype=torch.float64)
    nothing, positions = torch.zeros(1, 1, 16, dtype=torch.float64), torch.zeros(1, dtype=torch.long)
    for name, spec in signature(Gated).gates.items():
        found = layer.gates[name](nothing, positions)
        torch.testing.assert_close(found, torch.full_like(found, spec.init), rtol=1e-12, atol=0.0)
    assert layer(torch.randn(1, 5, 16, dtype=torch.float64)).isfinite().all()


@pytest.mark.parametrize("name", LIBRARY)
def test_no_ready_variant_begins_by_forgetting(name):
    declared, layer = signature(LIBRARY[name]), module(LIBRARY[name])
    rates = {declared.update.of("decay", n) for n in declared.states}
    for rate in rates:
        if isinstance(rate, GateSpec):
            assert layer.gates[rate.name](torch.zeros(1, 1, 16), torch.zeros(1, dtype=torch.long)).min() >= 0.9


@pytest.mark.parametrize(
    ("gate", "said"),
    [
        (dict(init=1.0), r"its init is 1, but it lies between 0 and 1"),
        (dict(init=0.2, scale="1/D"), r"its init is 0\.2, but it lies between 0 and 0\.125"),
        (dict(init=-1.0, activation="softplus"), r"its init is -1, but it lies between 0 and inf"),
        (dict(init=0.5, low=0.9, scale=0.1), r"its init is 0\.5, but it lies between 0\.9 and 1"),
        (dict(init=0.5, by="position"), r'by="position" and has the init 0\.5'),
        (dict(init="big"), r"has the init 'big'"),
        (dict(init=math.nan), r"has the init nan"),
        (dict(low=math.inf), r"has the low inf"),
    ],
)
def test_a_gate_that_cannot_begin_there_is_refused(gate, said):
    variant = DeltaNet.replace(update=tttc.sgd(lr=tttc.gate("rate", **gate)))
    with pytest.raises(DeclarationError, match=rf"gate `rate`.*{said}"):
        module(variant)


# -- what the layer hands on -------------------------------------------------------------------------------------------


def test_check_is_handed_on():
    x = torch.full((1, 3, 16), math.nan)
    with pytest.raises(NonFinite):
        module(TTTLinear, check=True, backend="torch")(x)
    module(TTTLinear, backend="torch")(x)


def test_telemetry_is_handed_on():
    x = torch.randn(1, 20, 16)
    _, cache = module(TTTLinear, telemetry=True, backend="torch")(x, return_state=True)
    assert cache.state.telemetry["loss_before"].shape == (1, 2, 2)
    _, cache = module(TTTLinear, backend="torch")(x, return_state=True)
    assert not cache.state.telemetry


# -- training ----------------------------------------------------------------------------------------------------------


class Model(nn.Module):
    """Blocks of the layer at its defaults, each with a residual, on bytes."""

    def __init__(self, variant: type[tttc.Variant], depth: int, **options):
        super().__init__()
        dims = {"M": HIDDEN // 2} if "M" in signature(variant).dims else {}
        self.embedding = nn.Embedding(256, HIDDEN)
        self.norms = nn.ModuleList(nn.RMSNorm(HIDDEN, eps=1e-6) for _ in range(depth + 1))
        self.layers = nn.ModuleList(tttc.nn.TTT(variant, HIDDEN, 2, dims=dims, **options) for _ in range(depth))
        nn.init.normal_(self.embedding.weight, std=HIDDEN**-0.5)

    def forward(self, tokens):
        x = self.embedding(tokens)
        for norm, layer in zip(self.norms, self.layers, strict=False):
            x = x + layer(norm(x))
        return F.linear(self.norms[-1](x), self.embedding.weight)


def trained(variant, steps, dtype=torch.float32, tokens=TOKENS, depth=1, **options):
    """The loss of every step; it ends where a number is not finite."""
    text = torch.frombuffer(bytearray(inspect.getsource(inspect).encode()), dtype=torch.uint8).long()
    torch.manual_seed(0)
    model = Model(variant, depth, **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3, betas=(0.9, 0.95))
    losses = []
    for _ in range(steps):
        starts = torch.randint(len(text) - tokens, (4, 1))
        window = text[starts + torch.arange(tokens + 1)]
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = model(window[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), window[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        losses.append(loss.item())
        if not (loss.isfinite() and norm.isfinite()):
            break
        optimizer.step()
    return losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_delta_rule_trains_at_its_defaults(dtype):
    losses = trained(GatedDeltaNet, 8, dtype, tokens=64)
    assert len(losses) == 8
    assert losses[-1] < losses[0] - 1.0


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LIBRARY)
def test_every_ready_variant_trains_at_its_defaults(name, dtype, monkeypatch):
    monkeypatch.delenv("TTTC_BACKEND")
    losses = trained(LIBRARY[name], STEPS, dtype, depth=2)
    assert len(losses) == STEPS
    assert max(losses) < losses[0] + 1.0
    assert sum(losses[-20:]) / 20 < losses[0] - 2.0


def test_declarations_stay_short():
    for name, variant in LIBRARY.items():
        assert len(inspect.getsource(variant).splitlines()) <= 25, name
        assert dims_of(variant, 3)
