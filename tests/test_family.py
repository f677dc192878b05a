"""The whole library, each declaration with the read, anchor, steps and update that it was published with.

tests/test_oracle_matrix.py crosses a few plain learners with every read; here every rule is itself, and only the
mini-batches are short. Against the oracle the tolerance is 1e-11: both sides round at 1.1e-16, in another order, and
some rules (l_3 losses, divisions by norms) amplify that over the tokens. Against the same layer cut in another way it
is 1e-12: the same sums of a dozen tokens, added up in another order. A wrong term is above 1e-4.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch

import tttc
from tests.helpers import (
    LIBRARY,
    compiled,
    differences,
    dims_of,
    gradients,
    inputs_for,
    keywords,
    layer_result,
    oracle_result,
    result_of,
    split_call,
)
from tests.test_gradients import positional
from tttc.declare.read import signature
from tttc.errors import StateMismatch
from tttc.verification.comparison import gradient_errors, random_inputs, relative_error

ORACLE = 1e-11
OTHER_ORDER = 1e-12
MINI_BATCHES = (1, 4, "all")
# (mini-batch, chunk): free chunks, and tiles of a mini-batch. What takes longest to compile is left to the slow tests.
CHUNKS = (
    *((4, 3), ("all", 5)),
    *(pytest.param(1, c, marks=pytest.mark.slow) for c in (1, 3, 5)),
    *(pytest.param(b, c, marks=pytest.mark.slow) for b, c in ((4, 1), (4, 5), ("all", 1), ("all", 3))),
)
TOKENS = 11  # two mini-batches of 4, and one that ends early

# What the library has no variant for: what else a sequence can carry beside its weights, on learners of the library.
lr, momentum, rho = tttc.gate("lr"), tttc.gate("momentum"), tttc.gate("rho")
MORE = {
    "averaged delta rule": ("DeltaNet", {"update": tttc.sgd(lr, average=rho)}),
    "averaged MLP with momentum": ("TTTMLP", {"update": tttc.sgd(lr, momentum=momentum, nesterov=True, average=rho)}),
    "EMA momentum": ("TTTLinear", {"update": tttc.sgd(lr, momentum=momentum, ema=True)}),
    "two steps, read at the start": ("MTTT", {"read": "start"}),  # an open mini-batch keeps its tokens
}
CASES = {name: (name, {}) for name in LIBRARY} | MORE


@cache
def layer_of(case, mini_batch, chunk=None, decode="sums"):
    """The layer of a case; wide enough to tell the axes D and F apart, and narrow enough for the oracle."""
    name, settings = CASES[case]
    variant = LIBRARY[name].replace(mini_batch=mini_batch, **settings)
    return tttc.compile(variant, dims_of(variant, 4, 6), torch.float64, chunk=chunk, decode=decode)


def is_causal(case):
    name, settings = CASES[case]
    return settings.get("read", LIBRARY[name].read) != "end"


CAUSAL = [case for case in CASES if is_causal(case)]
NOT_CAUSAL = [case for case in CASES if not is_causal(case)]
every_case = pytest.mark.parametrize("case", CASES)
every_causal_case = pytest.mark.parametrize("case", CAUSAL)
every_length = pytest.mark.parametrize("mini_batch", MINI_BATCHES)


@cache
def inputs_of(case, mini_batch):
    return inputs_for(layer_of(case, mini_batch), TOKENS)


@cache
def wanted_of(case, mini_batch):
    """Outputs, final weights and gradients of the oracle, once for every chunk that is compared with them."""
    return oracle_result(layer_of(case, mini_batch).signature.variant, inputs_of(case, mini_batch))


@cache
def whole_of(case, mini_batch):
    """The same of the layer, in one call and with the chunk that the compiler chooses."""
    return layer_result(layer_of(case, mini_batch), inputs_of(case, mini_batch))


# -- the oracle, and chunks ---------------------------------------------------------------------------------


@every_length
@every_case
def test_equals_the_oracle(case, mini_batch):
    """Outputs, final weights and every gradient, at a length that ends inside a mini-batch."""
    assert not differences(whole_of(case, mini_batch), wanted_of(case, mini_batch), ORACLE, ORACLE)


@pytest.mark.parametrize(("mini_batch", "chunk"), CHUNKS)
@every_case
def test_chunks_do_not_matter(case, mini_batch, chunk):
    """A free chunk of any length, or tiles of a mini-batch: the oracle's result, and that of the chunk chosen."""
    layer = layer_of(case, mini_batch, chunk)
    if layer.stages.program.plan == layer_of(case, mini_batch).stages.program.plan:
        return  # the chunk is the mini-batch, or one token: there is no other
    found = layer_result(layer, inputs_of(case, mini_batch))
    assert not differences(found, wanted_of(case, mini_batch), ORACLE, ORACLE)
    assert not differences(found, whole_of(case, mini_batch), OTHER_ORDER, OTHER_ORDER)


@every_case
def test_checkpoints_do_not_matter(case, monkeypatch):
    """Momentum and the like recomputed from what was kept, of several chunks or tiles: the same numbers."""
    layer = layer_of(case, 4, 3)
    for checkpoint in (None, 1, 2):
        monkeypatch.setattr(layer, "checkpoint", checkpoint)
        found = layer_result(layer, inputs_of(case, 4))
        assert not differences(found, whole_of(case, 4), OTHER_ORDER, OTHER_ORDER), checkpoint


@every_case
def test_batch_elements_and_heads_are_apart(case):
    """B = 2 and H = 3 at once equal the oracle, which takes them one by one; also where a state is handed on."""
    layer = layer_of(case, 4)
    inputs = inputs_for(layer, 6, batch=2, heads=3)
    wanted = oracle_result(layer.signature.variant, inputs)
    assert not differences(layer_result(layer, inputs), wanted, ORACLE, ORACLE)
    cut = 5 if is_causal(case) else 4
    assert not differences(result_of(*split_call(layer, inputs, [cut]), inputs), wanted, ORACLE, ORACLE)


@every_length
@every_case
def test_no_tokens(case, mini_batch):
    """T = 0: an empty output of the right width, and the state as it was."""
    layer = layer_of(case, mini_batch)
    inputs = inputs_for(layer, 0)
    z, state = layer(inputs.q, inputs.k, inputs.v, **keywords(inputs))
    assert z.shape == (1, 0, 1, 4)
    assert set(state) == set(inputs.state)
    for n, w in inputs.state.items():
        assert torch.equal(state[n], w)


# -- calls --------------------------------------------------------------------------------------------------


def no_choice(layer, decode):
    """Whether an open mini-batch cannot be carried as its tokens: nothing tells where it ends, or tiles it."""
    return decode == "rows" and layer.decode != decode


def split_differences(case, mini_batch, decode, *ways):
    """How the sequence cut in each of these ways differs from the one that is not, gradients included."""
    layer, inputs = layer_of(case, mini_batch, decode=decode), inputs_of(case, mini_batch)
    found = {}
    for cuts in () if no_choice(layer, decode) else ways:
        result = result_of(*split_call(layer, inputs, cuts), inputs)
        found[tuple(cuts)] = differences(result, whole_of(case, mini_batch), OTHER_ORDER, OTHER_ORDER)
    return "\n".join(f"cut at {cuts}\n{text}" for cuts, text in found.items() if text)


WAYS = {  # with empty calls: before the first token, inside a mini-batch, and at the end of one
    1: ([3], [0, 2, 5, 5, 9]),
    4: ([1], [3], [4], [10], [0, 2, 5, 5, 9], [4, 4, 7]),
    "all": ([1], [6], [0, 2, 5, 5, 9]),
}
# An open mini-batch is carried as sums or as its tokens, where there is a choice.
every_split = pytest.mark.parametrize(
    ("mini_batch", "decode"), [(1, "sums"), (4, "sums"), (4, "rows"), ("all", "sums")]
)


@every_split
@every_causal_case
def test_cut_anywhere(case, mini_batch, decode):
    """Around every token of short mini-batches: outputs, weights, and gradients through what is handed on."""
    assert not split_differences(case, mini_batch, decode, *WAYS[mini_batch])


@every_split
@every_causal_case
def test_token_by_token(case, mini_batch, decode):
    assert not split_differences(case, mini_batch, decode, list(range(1, TOKENS)))


@pytest.mark.parametrize("case", NOT_CAUSAL)
def test_reading_the_end_is_cut_at_whole_mini_batches(case):
    """There the result is that of one call; anywhere else the outputs already returned would have to change."""
    assert not split_differences(case, 4, "sums", [4], [8], [4, 8])
    for cut in (1, 3, 6):
        with pytest.raises(StateMismatch):
            split_call(layer_of(case, 4), inputs_of(case, 4), [cut])


def part_of(inputs, tokens):
    """The inputs of some of the tokens."""
    gates, extra = ({n: x[:, tokens] for n, x in group.items()} for group in (inputs.gates, inputs.tokens))
    q, k, v = (x[:, tokens] for x in (inputs.q, inputs.k, inputs.v))
    return replace(inputs, q=q, k=k, v=v, gates=gates, tokens=extra)


@pytest.mark.parametrize("decode", ["sums", "rows"])
@every_causal_case
def test_a_state_without_its_history_continues_the_same(case, decode):
    """`detach` and `to` keep the position, the memories and the open mini-batch: to the last digit the same outputs,
    and no gradient flows to the tokens before.
    """
    layer, inputs = layer_of(case, 4, decode=decode), inputs_of(case, 4)
    if no_choice(layer, decode):
        return
    first, second = part_of(inputs, slice(0, 6)), part_of(inputs, slice(6, TOKENS))
    _, state = layer(first.q, first.k, first.v, **keywords(first))

    def continued(state):
        return layer(second.q, second.k, second.v, **(keywords(second) | {"state": state}))

    wanted, _ = continued(state)
    for handed_on in (state.detach(), state.to("cpu", torch.float64), state.detach().to(torch.float64)):
        z, after = continued(handed_on)
        assert torch.equal(z, wanted)
        assert (handed_on.position, after.position) in ((2, 3), (0, 0))  # 0: no mini-batch can be observed
    z, _ = continued(state.to(torch.float32))  # rounded once at 6e-8
    assert relative_error(z, wanted) <= 1e-5
    tensors = []
    state.detach().map(tensors.append)
    assert tensors
    assert not any(x.requires_grad for x in tensors)
    z, _ = continued(state.detach())
    (gradient,) = torch.autograd.grad(z.sum(), inputs.k, materialize_grads=True)
    assert not gradient[:, :6].any()
    z, _ = continued(state)
    (gradient,) = torch.autograd.grad(z.sum(), inputs.k)
    assert gradient[:, :6].any()


# -- causality ----------------------------------------------------------------------------------------------


def perturbed(layer, inputs, names, t):
    """The outputs where the inputs `names` have other values at token t."""
    noise = torch.Generator().manual_seed(t)
    moved = {n: x.detach().clone() for n, x in inputs.named().items()}
    for n in names:
        moved[n][:, t] += torch.rand(moved[n][:, t].shape, generator=noise, dtype=torch.float64)
    gates, extra = ({n: moved[n] for n in group} for group in (inputs.gates, inputs.tokens))
    with torch.no_grad():
        return layer(moved["q"], moved["k"], moved["v"], **(keywords(inputs) | {"gates": gates, "tokens": extra}))[0]


@pytest.mark.parametrize("mini_batch", [4, "all"])
@every_causal_case
def test_causality_is_exact(case, mini_batch):
    """Changing everything of token t leaves every output before it alone, to the last bit. Where its own mini-batch is
    read at the start, what token t adds is not seen before the next one.
    """
    layer, inputs = layer_of(case, mini_batch, 4), inputs_of(case, mini_batch)
    every = ["q", "k", "v", *inputs.gates, *inputs.tokens]
    sources = [n for n in every if n not in ("q", "tau")]
    same = perturbed(layer, inputs, [], 0)
    for t in range(TOKENS) if mini_batch == 4 else (0, 5, 9):
        assert torch.equal(perturbed(layer, inputs, every, t)[:, :t], same[:, :t]), f"token {t} is seen too early"
        if layer.signature.read == "start":
            seen = TOKENS if mini_batch == "all" else t // 4 * 4 + 4
            z = perturbed(layer, inputs, sources, t)
            assert torch.equal(z[:, :seen], same[:, :seen]), f"token {t} is seen by its own mini-batch"
            assert seen >= TOKENS or not torch.equal(z[:, seen], same[:, seen]), f"token {t} is not seen at all"
        elif t + 1 < TOKENS:
            assert not torch.equal(perturbed(layer, inputs, sources, t)[:, t + 1], same[:, t + 1]), f"{t} is not seen"


# -- decoding -----------------------------------------------------------------------------------------------


def decoded(case, dtype):
    """The relative errors of 1000 tokens at once and 256 one by one, against 1256 at once."""
    name, settings = CASES[case]
    own = LIBRARY[name].mini_batch
    variant = LIBRARY[name].replace(**settings, mini_batch=64 if own in ("all", 2048) else own)
    layer = tttc.compile(variant, dims_of(variant, 4, 6), dtype)
    inputs = as_dtype(calmed(random_inputs(layer.signature, layer.dims, 1, 1256, 1)), dtype)
    with torch.no_grad():
        wanted, final = layer(inputs.q, inputs.k, inputs.v, **keywords(inputs))
        found, state = split_call(layer, inputs, list(range(1000, 1256)))
    errors = {"z": relative_error(found, wanted), "decoded z": relative_error(found[:, 1000:], wanted[:, 1000:])}
    return errors | {n: relative_error(state[n], w) for n, w in final.items()}


def calmed(inputs):
    """Small steps and slow forgetting. With those of `random_inputs`, a memory with LayerNorm is a chaotic map: over
    256 tokens the last bit of one key becomes 1e-8 of an output, whoever computes it.
    """

    def calm(name, gate):
        return 1.0 - 0.02 * (1.0 - gate) if name == "decay" else 0.1 * gate if name.startswith("lr") else gate

    return replace(inputs, gates={n: calm(n, x) for n, x in inputs.gates.items()})


# One for each kind of state: weights alone, momentum beside an open mini-batch, the tokens of that.
DECODED = ("KDA", "Titans", "two steps, read at the start")


@pytest.mark.parametrize("case", [pytest.param(c, marks=() if c in DECODED else pytest.mark.slow) for c in CAUSAL])
def test_decoding_after_a_long_prefill(case):
    """In float64 1e-11, for the weights of the last token are the sum of all tokens; in float32, which rounds at 6e-8,
    1e-5.
    """
    assert max(decoded(case, torch.float64).values()) <= 1e-11
    assert max(decoded(case, torch.float32).values()) <= 1e-5


def as_dtype(inputs, dtype):
    """The same inputs in another dtype, without history."""
    groups = {}
    for n, x in vars(inputs).items():
        moved = {m: y.detach().to(dtype) for m, y in x.items()} if isinstance(x, dict) else x.detach().to(dtype)
        groups[n] = moved
    return replace(inputs, **groups)


# -- numerical derivatives ----------------------------------------------------------------------------------

# One for each mechanism: a decay for each channel, a triangular system, both, momentum in a triangular system, momentum
# and decay of frozen gradients, stages at the end with momentum once per mini-batch, a view, several steps.
MECHANISMS = ("GLA", "GatedDeltaNet", "KDA", "MomentumDeltaNet", "Titans", "LaCT", "Moneta", "MTTT")
SLOW_MECHANISMS = ("Titans", "LaCT", "Moneta")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW_MECHANISMS else ()) for n in MECHANISMS]
)
def test_gradcheck(name):
    """Every entry of the Jacobian by every input, against central differences (torch's tolerances: 1e-5 absolute,
    1e-3); a whole mini-batch of 2, and one that is left open.
    """
    layer = compiled(name, 2, 3, mini_batch=2)
    function, values = positional(layer, inputs_for(layer, 3))
    assert torch.autograd.gradcheck(function, values)


@pytest.mark.parametrize("name", MECHANISMS)
def test_gradgradcheck(name):
    """The derivative of the backward, along random directions: all entries would be tens of thousands of calls."""
    layer = compiled(name, 2, 3, mini_batch=2)
    function, values = positional(layer, inputs_for(layer, 3))
    assert torch.autograd.gradgradcheck(function, values, fast_mode=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", MECHANISMS)
def test_gradgradcheck_of_every_entry(name):
    layer = compiled(name, 2, 2, mini_batch=2)
    function, values = positional(layer, inputs_for(layer, 3))
    assert torch.autograd.gradgradcheck(function, values)


# -- extreme rates ------------------------------------------------------------------------------------------


def recurrence(inputs):
    """W_t = diag(decay_t) W_{t-1} + dt_t k_t^T v_t, z_t = q_t W_t, token by token, of one batch element and head."""
    q, k, v = (x[0, :, 0] for x in (inputs.q, inputs.k, inputs.v))
    decay = inputs.gates["decay"][0, :, 0]
    dt = inputs.gates["dt"][0, :, 0] if "dt" in inputs.gates else torch.ones(len(q), dtype=q.dtype)
    W, outputs = inputs.state["W"][0, 0], []
    for t in range(len(q)):
        W = decay[t].reshape(-1, 1) * W + dt[t] * torch.outer(k[t], v[t])
        outputs.append(q[t] @ W)
    return torch.stack(outputs)[None, :, None], {"W": W[None, None]}


@pytest.mark.parametrize("name", ["Mamba2", "GLA"])
def test_small_decays_do_not_overflow(name):
    """Decays of 1e-4 over 4096 tokens in float32, where a product of 10 of them underflows and its inverse overflows,
    then some of them between tokens that forget slowly: everything is finite, and equal to the recurrence in float64.
    5e-6: a sum over the 64 tokens of a chunk at 6e-8; gradients within twice that.
    """
    layer = tttc.compile(LIBRARY[name], dims_of(LIBRARY[name], 4), torch.float32)
    inputs = random_inputs(layer.signature, layer.dims, 1, 4096, 1)
    decay = torch.full_like(inputs.gates["decay"], 1e-4)
    decay[:, 2048:] = 0.999
    decay[:, 2048::7] = 1e-4
    single = as_dtype(replace(inputs, gates=inputs.gates | {"decay": decay}), torch.float32)
    double = as_dtype(single, torch.float64)  # the recurrence takes the same numbers
    single, double = leaves_of(single), leaves_of(double)
    z, final = layer(single.q, single.k, single.v, **keywords(single))
    wanted, wanted_final = recurrence(double)
    z, final = z.double(), {n: w.double() for n, w in final.items()}
    found_gradients = {n: g.double() for n, g in gradients(z, final, single.named(), 0).items()}
    wanted_gradients = gradients(wanted, wanted_final, double.named(), 0)
    assert all(torch.isfinite(x).all() for x in (z, *final.values(), *found_gradients.values()))
    assert relative_error(z, wanted) <= 5e-6
    assert relative_error(final["W"], wanted_final["W"]) <= 5e-6
    assert max(gradient_errors(found_gradients, wanted_gradients).values()) <= 1e-5


def leaves_of(inputs):
    """The same inputs as leaves of autograd."""
    groups = {}
    for n, x in vars(inputs).items():
        groups[n] = {m: y.requires_grad_() for m, y in x.items()} if isinstance(x, dict) else x.requires_grad_()
    return replace(inputs, **groups)


DECAYING = [n for n in LIBRARY if "decay" in signature(LIBRARY[n]).gates]
WITH_MOMENTUM = [n for n in LIBRARY if "momentum" in signature(LIBRARY[n]).gates]


def with_gate(inputs, name, tokens, value):
    """The same inputs, where a gate has this value at some tokens."""
    gate = inputs.gates[name].detach().clone()
    gate[:, tokens] = value
    return replace(inputs, gates=inputs.gates | {name: gate.requires_grad_()})


@pytest.mark.parametrize("mini_batch", [4, "all"])
@pytest.mark.parametrize("name", DECAYING)
def test_a_decay_of_zero(name, mini_batch):
    """Forgetting everything is exact, value and derivative: products of decays are never quotients. At one token, at
    two in a row, at the last one, or at all of them (but where weights are divided by a norm that is then almost 0: one
    rounding becomes everything).
    """
    layer = layer_of(name, mini_batch)
    for tokens in ([3], [0, 1], [5, TOKENS - 1], *([] if name == "Moneta" else [list(range(TOKENS))])):
        inputs = with_gate(inputs_of(name, mini_batch), "decay", tokens, 0.0)
        if name == "Moneta":  # what is left after that is divided by its norm: steps that are not small
            inputs = with_gate(inputs, "lr", list(range(TOKENS)), 0.05)
        wanted = oracle_result(layer.signature.variant, inputs)
        assert not differences(layer_result(layer, inputs), wanted, ORACLE, ORACLE), tokens


@pytest.mark.parametrize("mini_batch", [4, "all"])
@pytest.mark.parametrize("name", WITH_MOMENTUM)
def test_a_negative_momentum(name, mini_batch):
    """Any number is a momentum: of either sign, 0, and larger than 1."""
    layer, inputs = layer_of(name, mini_batch), inputs_of(name, mini_batch)
    for first, value in enumerate((-0.7, 0.0, 1.2)):
        inputs = with_gate(inputs, "momentum", list(range(first, TOKENS, 4)), value)
    wanted = oracle_result(layer.signature.variant, inputs)
    assert not differences(layer_result(layer, inputs), wanted, ORACLE, ORACLE)
