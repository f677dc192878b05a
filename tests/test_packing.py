"""Packed sequences (cu_seqlens), and q heads that share the weights of one k, v head."""

from __future__ import annotations

import pytest
import torch

import tttc
from tests.helpers import LIBRARY, dims_of
from tests.learners import DIMS, CausalConvolution
from tttc.declare.read import signature
from tttc.errors import ShapeError, StateMismatch
from tttc.verification.comparison import GRADIENT_TOLERANCE, OUTPUT_TOLERANCE, random_inputs, relative_error

# One for each way of carrying a state: sums, weights alone, accumulators and momentum, rows, taps.
VARIANTS = {n: LIBRARY[n] for n in ("TTTLinear", "GatedDeltaNet", "MTTT", "GLA")}
VARIANTS |= {n: LIBRARY[n].replace(mini_batch=4) for n in ("LaCT", "Moneta", "Titans")}
VARIANTS["CausalConvolution"] = CausalConvolution
ENDS = [0, 5, 5, 12, 17, 23]  # one sequence is empty, two are of one length
every_variant = pytest.mark.parametrize("name", VARIANTS)


def prepared(name):
    """A layer, inputs of 23 tokens and 2 heads, and a state for each of the five sequences."""
    variant = VARIANTS[name]
    layer = tttc.compile(
        variant, dims_of(variant, 4, 6) | ({"K": DIMS["K"]} if name == "CausalConvolution" else {}), torch.float64
    )
    inputs = random_inputs(signature(variant), layer.dims, 1, ENDS[-1], 2)
    scales = torch.linspace(0.8, 1.2, 5, dtype=torch.float64)
    states = {n: torch.cat([x * s for s in scales]) for n, x in inputs.state.items()}
    return layer, inputs, states


def cut(inputs, part):
    """The tokens of one part of the sequence, as arguments of a call."""
    own = {"gates": inputs.gates, "tokens": inputs.tokens}
    own = {kind: {n: x[:, part] for n, x in group.items()} for kind, group in own.items()}
    return (inputs.q[:, part], inputs.k[:, part], inputs.v[:, part]), own | {"params": inputs.params}


@every_variant
def test_packed_sequences_are_sequences_by_themselves(name):
    """Outputs, final weights and gradients through both."""
    layer, inputs, states = prepared(name)
    tensors, keywords = cut(inputs, slice(None))
    z, final = layer(*tensors, **keywords, state=states, cu_seqlens=torch.tensor(ENDS))
    alone, finals = [], []
    for i in range(5):
        tensors, keywords = cut(inputs, slice(ENDS[i], ENDS[i + 1]))
        z_i, final_i = layer(*tensors, **keywords, state={n: x[i : i + 1] for n, x in states.items()})
        alone.append(z_i)
        finals.append(final_i)
    wanted = torch.cat(alone, 1)
    assert relative_error(z, wanted) <= OUTPUT_TOLERANCE
    total, total_wanted = z.square().sum(), wanted.square().sum()
    for n in final:
        together = torch.cat([f[n] for f in finals])
        assert relative_error(final[n], together) <= OUTPUT_TOLERANCE
        total, total_wanted = total + final[n].square().sum(), total_wanted + together.square().sum()
    leaves = [x for x in inputs.named().values() if x.requires_grad]
    found, true = (torch.autograd.grad(t, leaves, allow_unused=True, retain_graph=True) for t in (total, total_wanted))
    for g, g_true in zip(found, true, strict=True):
        assert (g is None) == (g_true is None)
        assert g is None or relative_error(g, g_true) <= GRADIENT_TOLERANCE


@pytest.mark.parametrize("name", [n for n in VARIANTS if n != "MTTT"])
def test_packed_sequences_continue(name):
    """Each at its own place of a mini-batch; MTTT reads the future of its mini-batch."""
    layer, inputs, states = prepared(name)
    first, second = [0, 3, 3, 7, 9, 10], [0, 2, 2, 5, 8, 13]
    tensors, keywords = cut(inputs, slice(0, 10))
    z_first, state = layer(*tensors, **keywords, state=states, cu_seqlens=first)
    tensors, keywords = cut(inputs, slice(10, 23))
    z_second, final = layer(*tensors, **keywords, state=state, cu_seqlens=second)
    for i in range(5):
        parts = [slice(first[i], first[i + 1]), slice(10 + second[i], 10 + second[i + 1])]
        order = [t for part in parts for t in range(part.start, part.stop)]
        tensors, keywords = cut(inputs, order)
        z, one = layer(*tensors, **keywords, state={n: x[i : i + 1] for n, x in states.items()})
        found = torch.cat([z_first[:, parts[0]], z_second[:, second[i] : second[i + 1]]], 1)
        assert relative_error(found, z) <= OUTPUT_TOLERANCE
        assert all(relative_error(final[n][i : i + 1], one[n]) <= OUTPUT_TOLERANCE for n in one)


@every_variant
def test_grouped_heads_read_the_weights_of_their_group(name):
    """Two q heads for each k, v head: as if k and v had been repeated; the state is that of the k, v heads."""
    layer, inputs, _ = prepared(name)
    tensors, keywords = cut(inputs, slice(None))
    q = torch.stack([tensors[0], 0.5 * tensors[0].flip(1)], 3).flatten(2, 3)  # heads 0, 1 read group 0
    z, final = layer(q, *tensors[1:], **keywords, state=inputs.state)
    for member in range(2):
        wanted, wanted_final = layer(q[:, :, member::2], *tensors[1:], **keywords, state=inputs.state)
        assert relative_error(z[:, :, member::2], wanted) <= OUTPUT_TOLERANCE
        assert all(relative_error(final[n], w) <= OUTPUT_TOLERANCE for n, w in wanted_final.items())


def test_grouped_heads_continue():
    layer, inputs, _ = prepared("TTTLinear")
    (q, k, v), keywords = cut(inputs, slice(None))
    q = torch.cat([q, q], 2)
    whole, _ = layer(q, k, v, **keywords, state=inputs.state)
    (_, k1, v1), first = cut(inputs, slice(0, 5))
    (_, k2, v2), second = cut(inputs, slice(5, 23))
    z1, state = layer(q[:, :5], k1, v1, **first, state=inputs.state)
    z2, _ = layer(q[:, 5:], k2, v2, **second, state=state)
    assert relative_error(torch.cat([z1, z2], 1), whole) <= OUTPUT_TOLERANCE


@pytest.mark.parametrize("ends", [[0, 5], [1, 23], [0, 12, 5, 23], [23], [0, 24]])
def test_boundaries_that_do_not_cover_the_tokens_are_refused(ends):
    layer, inputs, _ = prepared("TTTLinear")
    tensors, keywords = cut(inputs, slice(None))
    with pytest.raises(ShapeError, match="Packed sequences are"):
        layer(*tensors, **keywords, state=inputs.state, cu_seqlens=ends)


def test_states_of_another_number_of_sequences_are_refused():
    layer, inputs, states = prepared("TTTLinear")
    tensors, keywords = cut(inputs, slice(None))
    _, state = layer(*tensors, **keywords, state=states, cu_seqlens=ENDS)
    with pytest.raises(StateMismatch, match="5 states are given for 2"):
        layer(*tensors, **keywords, state=state, cu_seqlens=[0, 5, 23])


def test_heads_that_do_not_divide_are_refused():
    layer, inputs, _ = prepared("TTTLinear")
    (q, k, v), keywords = cut(inputs, slice(None))
    with pytest.raises(ShapeError, match="q has 3 heads, k has 2"):
        layer(torch.cat([q, q[:, :, :1]], 2), k, v, **keywords)
