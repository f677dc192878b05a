"""What a layer reports of its inner loop, against the user's own loss at the weights between mini-batches."""

from __future__ import annotations

import warnings

import pytest
import torch

import tttc
from tests.helpers import LIBRARY, differences, dims_of, inputs_for, keywords, layer_result
from tttc.declare.read import signature
from tttc.runtime.stability import UnstableInnerLoop

TOLERANCE = 1e-10  # sums of squares of differences of weights: they cancel a few digits of float64


def losses(variant, inputs, weights, tokens):
    """The sum of the user's loss over tokens, and its gradient by every state, of the first batch element and head."""
    declared = signature(variant)
    fast = {n: weights[n][0, 0].detach().requires_grad_() for n in declared.states}
    slow = {n: x[0] for n, x in inputs.params.items()}
    total = torch.zeros((), dtype=torch.float64)
    for t in tokens:
        gates = {a: inputs.gates[n][0, t, 0] for a, n in declared.attributes.items()}
        extras = {n: x[0, t, 0] for n, x in inputs.tokens.items()}
        bound = variant.bind(fast | slow | gates | extras)
        total = total + bound.loss(inputs.k[0, t, 0], inputs.v[0, t, 0])
    return total, torch.autograd.grad(total, list(fast.values()))


@pytest.mark.parametrize("name", ["TTTLinear", "LinearAttention", "Titans", "LaCT", "Moneta", "GatedThreeLayer"])
def test_telemetry_is_what_the_loss_says(name):
    """Frozen gradients: loss, gradient and update of three mini-batches, the last one short."""
    variant = LIBRARY[name].replace(mini_batch=4)
    layer = tttc.compile(variant, dims_of(variant, 4, 6), torch.float64, telemetry=True)
    inputs = inputs_for(layer, 10)
    plain = tttc.compile(variant, layer.dims, torch.float64)
    assert differences(layer_result(layer, inputs), layer_result(plain, inputs)) == ""
    _, state = layer(inputs.q, inputs.k, inputs.v, **keywords(inputs))
    assert {n: tuple(x.shape) for n, x in state.telemetry.items()} == dict.fromkeys(
        ("loss_before", "loss_after", "gradient_norm", "update_norm"), (1, 1, 3)
    )
    found = {n: x[0, 0] for n, x in state.telemetry.items()}
    before, current = inputs.state, inputs.state
    for i, tokens in enumerate((range(4), range(4, 8), range(8, 10))):
        part = slice(tokens.start, tokens.stop)
        gates = {n: x[:, part] for n, x in inputs.gates.items()}
        _, current = plain(
            *(x[:, part] for x in (inputs.q, inputs.k, inputs.v)), gates=gates, params=inputs.params, state=current
        )
        loss, gradient = losses(variant, inputs, before, tokens)
        after, _ = losses(variant, inputs, current, tokens)
        moved = torch.stack([(current[n] - before[n]).square().sum() for n in current]).sum().sqrt()
        norm = torch.stack([g.square().sum() for g in gradient]).sum().sqrt()
        wanted = {"loss_before": loss, "loss_after": after, "gradient_norm": norm, "update_norm": moved}
        for n, x in wanted.items():
            x = float(x.detach())
            assert abs(float(found[n][i]) - x) <= TOLERANCE * (1 + abs(x)), (n, i)
        before = current


@pytest.mark.parametrize("name", sorted(LIBRARY))
def test_every_variant_can_be_measured(name):
    variant = LIBRARY[name] if LIBRARY[name].mini_batch == "all" else LIBRARY[name].replace(mini_batch=4)
    layer = tttc.compile(variant, dims_of(variant, 4, 6), telemetry=True)
    inputs = inputs_for(layer, 10)
    narrow = [x.float() for x in (inputs.q, inputs.k, inputs.v)]
    others = {kind: {n: x.float() for n, x in group.items()} for kind, group in keywords(inputs).items()}
    _, state = layer(*narrow, **others)
    assert len(state.telemetry) == 4
    assert all(torch.isfinite(x).all() for x in state.telemetry.values())


def called(name, scale):
    layer = tttc.compile(LIBRARY[name], {"D": 8})
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 20, 2, 8, generator=generator) for _ in range(3))
    k = scale * torch.nn.functional.normalize(k, dim=-1)
    gates = {n: torch.ones(1, 20, 2) for n in layer.signature.gates}
    return layer(q, k, v, gates=gates, check=True)


@pytest.mark.parametrize("name", ["DeltaNet", "GatedDeltaNet"])
def test_a_step_that_overshoots_is_warned_of(name):
    """lr * |k|^2 is 2.25 here: the error of a token grows by its own step."""
    with pytest.warns(UnstableInnerLoop, match=r"the squared length of the key is 2\.25 > 2"):
        called(name, 1.5)


@pytest.mark.parametrize(("name", "scale"), [("DeltaNet", 1.4), ("Longhorn", 30.0), ("LinearAttention", 30.0)])
def test_a_step_that_does_not_overshoot_is_silent(name, scale):
    """The implicit step never overshoots; where gradients do not depend on the weights, there is nothing to."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        called(name, scale)
