"""A sequence may be cut anywhere: into calls, chunks, checkpoints or batch elements. The result does not change.

Tolerances are those of `tttc.verify`: the two sides add the same numbers in another order, in float64.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import tttc
from tests.helpers import (
    CAUSAL_READS,
    LIBRARY,
    MINI_BATCHES,
    READS,
    VARIANTS,
    compiled,
    differences,
    dims_of,
    inputs_for,
    keywords,
    layer_result,
    oracle_result,
    result_of,
    split_call,
)
from tttc.declare.read import signature
from tttc.errors import ShapeError, StateMismatch
from tttc.verification.comparison import OUTPUT_TOLERANCE, relative_error

NO_STEP = tttc.sgd(lr=0.0)
TOKENS = 18  # one mini-batch of 16 and a little more; four and a half of 4
LONG = 230  # a mini-batch of 200 tokens, and the beginning of another
TILED = (
    ("TTTLinear", {"mini_batch": "all"}),
    ("TTTMLP", {"mini_batch": 200}),
    ("GatedThreeLayer", {"mini_batch": 200}),
)


def with_state(inputs, state):
    """The same inputs with other weights, themselves leaves of autograd."""
    return replace(inputs, state={n: x.detach().clone().requires_grad_() for n, x in state.items()})


def split_differences(layer, inputs, *ways):
    """How the call cut in each of these ways differs from the one that is not."""
    wanted = layer_result(layer, inputs)
    found = {tuple(cuts): differences(result_of(*split_call(layer, inputs, cuts), inputs), wanted) for cuts in ways}
    return "\n".join(f"cut at {cuts}\n{text}" for cuts, text in found.items() if text)


# -- calls --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("read", CAUSAL_READS)
@pytest.mark.parametrize("mini_batch", MINI_BATCHES)
@pytest.mark.parametrize("name", VARIANTS)
def test_cut_anywhere(name, mini_batch, read):
    """Around the mini-batches, and in many places: gradients flow through the state that is handed on."""
    layer = compiled(name, mini_batch=mini_batch, read=read)
    assert not split_differences(layer, inputs_for(layer, TOKENS), [1], [4], [15], [16], [17], [2, 5, 9, 16])


@pytest.mark.parametrize("read", CAUSAL_READS)
@pytest.mark.parametrize("mini_batch", MINI_BATCHES)
@pytest.mark.parametrize("name", VARIANTS)
def test_token_by_token(name, mini_batch, read):
    layer = compiled(name, mini_batch=mini_batch, read=read)
    assert not split_differences(layer, inputs_for(layer, TOKENS), list(range(1, TOKENS)))


@pytest.mark.parametrize("name", VARIANTS)
def test_cut_where_every_state_has_its_own_position(name):
    """Prefill of any length, then decoding: outputs and weights after each of the first 9 tokens."""
    layer = compiled(name, mini_batch=4)
    inputs = inputs_for(layer, 9)
    whole, _ = layer(inputs.q, inputs.k, inputs.v, **keywords(inputs))
    for cut in range(1, 9):
        z, state = split_call(layer, inputs, [cut])
        assert relative_error(z, whole) <= OUTPUT_TOLERANCE, f"cut at {cut}"
        assert state.position == (0 if name == "LinearAttention" else 9 % 4)


@pytest.mark.parametrize("name", VARIANTS)
def test_non_causal_reading_is_cut_at_whole_mini_batches_only(name):
    layer = compiled(name, mini_batch=4, read="end")
    inputs = inputs_for(layer, TOKENS)
    assert not split_differences(layer, inputs, [4], [16], [4, 12])
    for cut in (1, 2, 5, 15):
        with pytest.raises(StateMismatch):
            split_call(layer, inputs, [cut])


@pytest.mark.parametrize("name", VARIANTS)
def test_a_whole_sequence_read_at_its_end_cannot_be_continued(name):
    layer = compiled(name, mini_batch="all", read="end")
    with pytest.raises(StateMismatch):
        split_call(layer, inputs_for(layer, TOKENS), [TOKENS - 1])


def test_a_state_may_be_started_anew():
    """`dict(state)` forgets the open mini-batch: the weights as they are become the start of the next one."""
    layer = compiled("TTTLinear", mini_batch=4)
    inputs = inputs_for(layer, 6)
    _, state = layer(inputs.q, inputs.k, inputs.v, **keywords(inputs))
    assert state.position == 2
    again = keywords(inputs) | {"state": dict(state)}
    z, _ = layer(inputs.q, inputs.k, inputs.v, **again)
    continued, _ = layer(inputs.q, inputs.k, inputs.v, **(again | {"state": state}))
    wanted = oracle_result(layer.signature.variant, with_state(inputs, dict(state)))
    assert relative_error(z, wanted.z) <= OUTPUT_TOLERANCE
    assert relative_error(continued, wanted.z) > 1e-3


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("mini_batch", [4, "all"])
def test_no_tokens_return_the_state(name, mini_batch):
    """T = 0: an empty output, and the state as it was, shaped as every other state and with its history."""
    layer = compiled(name, mini_batch=mini_batch)
    inputs = inputs_for(layer, 0, batch=2, heads=3)
    z, state = layer(inputs.q, inputs.k, inputs.v, **keywords(inputs))
    assert z.shape == (2, 0, 3, 3)
    for n, w in inputs.state.items():
        assert torch.equal(state[n], w)
        (gradient,) = torch.autograd.grad(state[n].sum(), w)
        assert torch.equal(gradient, torch.ones_like(w))


@pytest.mark.parametrize("name", VARIANTS)
def test_no_tokens_inside_a_mini_batch(name):
    """An empty call between two others leaves the open mini-batch open; one may also come first or last."""
    layer = compiled(name, mini_batch=4)
    assert not split_differences(layer, inputs_for(layer, 7, batch=2), [6, 6], [0], [7])


# -- chunks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 3, 7, 37, 64, 100])
def test_free_chunks(chunk):
    """Gradients that do not depend on the weights leave the chunk free."""
    layer = compiled("LinearAttention", chunk=chunk)
    inputs = inputs_for(layer, 37, heads=2)
    assert not differences(layer_result(layer, inputs), oracle_result(layer.signature.variant, inputs))


@pytest.mark.parametrize("read", CAUSAL_READS)
@pytest.mark.parametrize("chunk", [1, 5, 37])
@pytest.mark.parametrize("name", VARIANTS)
def test_tiles_of_the_whole_sequence(name, chunk, read):
    layer = compiled(name, mini_batch="all", read=read, chunk=chunk)
    inputs = inputs_for(layer, 37)
    assert not differences(layer_result(layer, inputs), oracle_result(layer.signature.variant, inputs))


@pytest.mark.parametrize("chunk", [1, 3, 4, 100])
@pytest.mark.parametrize("name", VARIANTS)
def test_tiles_of_short_mini_batches(name, chunk):
    """A chunk that does not divide the mini-batch of 4, or is longer."""
    layer = compiled(name, mini_batch=4, chunk=chunk)
    inputs = inputs_for(layer, TOKENS)
    assert not differences(layer_result(layer, inputs), oracle_result(layer.signature.variant, inputs))


@pytest.mark.parametrize("chunk", [None, 32, 200])
@pytest.mark.parametrize(("name", "settings"), TILED, ids=[f"{n}-{s['mini_batch']}" for n, s in TILED])
def test_tiles_of_long_mini_batches(name, settings, chunk):
    layer = compiled(name, chunk=chunk, **settings)
    assert layer.stages.program.plan.tiled == (chunk != 200 or settings["mini_batch"] == "all")
    inputs = inputs_for(layer, LONG)
    assert not differences(layer_result(layer, inputs), oracle_result(layer.signature.variant, inputs))
    assert not split_differences(layer, inputs, [64, 131, 199, 201])


# -- checkpoints --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpoint", [0, 1, 3, 1000, "auto"])
@pytest.mark.parametrize("name", VARIANTS)
def test_checkpoints_leave_every_gradient_alone(name, checkpoint):
    kept = compiled(name, mini_batch=4, chunk=4, checkpoint=None)
    recomputed = compiled(name, mini_batch=4, chunk=4, checkpoint=checkpoint)
    inputs = inputs_for(kept, 42)
    wanted, found = layer_result(kept, inputs), layer_result(recomputed, inputs)
    assert not differences(found, wanted)


# -- batch and heads ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_batch_elements_and_heads_are_apart(name):
    """B = 2 and H = 3 at once equal the oracle, which takes them one by one."""
    layer = compiled(name, mini_batch=4)
    inputs = inputs_for(layer, 6, batch=2, heads=3)
    assert not differences(layer_result(layer, inputs), oracle_result(layer.signature.variant, inputs))


@pytest.mark.parametrize("name", VARIANTS)
def test_a_state_may_lack_batch_and_heads(name):
    """[*dims], [H, *dims] and [B, H, *dims] of the same weights are one state; what is shared gets the sum of the
    gradients.
    """
    layer = compiled(name, mini_batch=4)
    inputs = inputs_for(layer, 6, batch=2, heads=3)
    full = {n: w[:1, :1].expand_as(w).detach().clone().requires_grad_() for n, w in inputs.state.items()}
    wanted = layer_result(layer, with_state(inputs, full))
    for shared_axes in ((0, 1), (0,)):
        fewer = {n: w[(0,) * len(shared_axes)] for n, w in full.items()}
        inputs_with_fewer = with_state(inputs, fewer)
        found = layer_result(layer, inputs_with_fewer)
        summed = {n: wanted.gradients[n].sum(shared_axes) for n in fewer}
        assert not differences(found, wanted._replace(gradients={**wanted.gradients, **summed}))


@pytest.mark.parametrize("name", VARIANTS)
def test_params_may_have_heads(name):
    """[*dims] and [H, *dims] of the same values are the same params."""
    layer = compiled(name, mini_batch=4)
    inputs = inputs_for(layer, 6, batch=2, heads=3)
    shared = {n: p[0].detach() for n, p in inputs.params.items()}
    arguments = keywords(inputs)
    z, _ = layer(inputs.q, inputs.k, inputs.v, **(arguments | {"params": shared}))
    per_head = {n: p.expand(3, *p.shape) for n, p in shared.items()}
    assert torch.equal(z, layer(inputs.q, inputs.k, inputs.v, **(arguments | {"params": per_head}))[0])


# -- causality and learning rates ---------------------------------------------------------------------------


def outputs(layer, inputs, changed, t):
    """Outputs where the inputs named in `changed` have other values at token t."""
    every = {"q": inputs.q, "k": inputs.k, "v": inputs.v, **inputs.gates, **inputs.tokens}
    noise = torch.Generator().manual_seed(t)
    moved = {n: x.detach().clone() for n, x in every.items()}
    for n in changed:
        moved[n][:, t] += torch.rand(moved[n][:, t].shape, generator=noise, dtype=torch.float64)
    gates = {n: moved[n] for n in inputs.gates}
    tokens = {n: moved[n] for n in inputs.tokens}
    with torch.no_grad():
        arguments = keywords(inputs) | {"gates": gates, "tokens": tokens}
        return layer(moved["q"], moved["k"], moved["v"], **arguments)[0]


@pytest.mark.parametrize("read", CAUSAL_READS)
@pytest.mark.parametrize("mini_batch", [4, "all"])
@pytest.mark.parametrize("name", VARIANTS)
def test_causality_is_exact(name, mini_batch, read):
    """Changing token t leaves every output before it alone, to the last bit; read="before" also that of t but for its
    query.
    """
    layer = compiled(name, mini_batch=mini_batch, read=read, chunk=4)
    inputs = inputs_for(layer, 11)
    every = ("q", "k", "v", *inputs.gates, *inputs.tokens)
    sources = [n for n in every if n not in ("q", "tau")]
    same = outputs(layer, inputs, (), 0)
    for t in range(11):
        assert torch.equal(outputs(layer, inputs, every, t)[:, :t], same[:, :t]), f"token {t} is seen too early"
        if read != "after":
            assert torch.equal(outputs(layer, inputs, sources, t)[:, : t + 1], same[:, : t + 1]), (
                f"token {t} sees itself"
            )
    assert not torch.equal(outputs(layer, inputs, every, 3)[:, 3:], same[:, 3:])


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("mini_batch", MINI_BATCHES)
@pytest.mark.parametrize("name", VARIANTS)
def test_a_zero_learning_rate_leaves_the_state_alone(name, mini_batch, read):
    """Exactly: the weights minus zero are the weights."""
    fixed = {} if signature(VARIANTS[name]).gates else {"update": NO_STEP}
    layer = compiled(name, mini_batch=mini_batch, read=read, **fixed)
    inputs = inputs_for(layer, TOKENS)
    gates = {n: torch.zeros_like(x) if n.startswith("lr") else x for n, x in inputs.gates.items()}
    _, state = layer(inputs.q, inputs.k, inputs.v, **(keywords(inputs) | {"gates": gates}))
    for n, w in inputs.state.items():
        assert torch.equal(state[n], w)


def test_a_missing_state_starts_at_its_init():
    """What is given is taken, the rest is what the declaration says."""
    layer = compiled("TTTLinear")
    inputs = inputs_for(layer, 5)
    given = {"W1": inputs.state["W1"]}
    whole = {"b1": layer.init_state()["b1"], **given}
    outputs = [
        layer(inputs.q, inputs.k, inputs.v, gates=inputs.gates, params=inputs.params, state=s)[0]
        for s in (given, whole)
    ]
    assert torch.equal(*outputs)


@pytest.mark.parametrize("decode", ["sums", "rows"])
@pytest.mark.parametrize("name", ["TTTLinear", "TTTMLP", "Titans", "LaCT", "Moneta", "Yaad", "GatedThreeLayer"])
def test_an_open_mini_batch_is_carried_either_way(name, decode):
    """As the sums of what it added or as its tokens: outputs, weights, and gradients through the state."""
    variant = LIBRARY[name].replace(mini_batch=4)
    layer = tttc.compile(variant, dims_of(variant, 3, 4), torch.float64, decode=decode)
    assert layer.decode == decode
    inputs = inputs_for(layer, 10, heads=2)
    wanted = layer_result(layer, inputs)
    z, state = split_call(layer, inputs, (1, 2, 5, 6, 7))
    assert differences(result_of(z, state, inputs), wanted) == ""


def test_the_smaller_way_is_taken():
    """A mini-batch of 16 tokens of 64 channels is smaller than a 64 x 256 matrix, not than an 8 x 8 one."""
    assert tttc.compile(LIBRARY["TTTMLP"], {"D": 64, "F": 256}).decode == "rows"
    assert tttc.compile(LIBRARY["TTTLinear"], {"D": 8}).decode == "sums"
    with pytest.raises(ShapeError, match='must be "auto", "sums" or "rows"'):
        tttc.compile(LIBRARY["TTTLinear"], {"D": 8}, decode="both")
