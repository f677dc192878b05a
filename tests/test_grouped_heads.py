"""q heads that share the weights of one k, v head, and states brought together: right, or refused with the reason.

A call equals its two halves, whatever has heads of its own; what would give the heads of a group weights of their own
is refused, and so are states that stand at different places.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tttc
from tests.helpers import LIBRARY, dims_of
from tttc.errors import ShapeError, StateMismatch
from tttc.runtime.state import PackedState, State
from tttc.verification.comparison import relative_error

F64 = torch.float64
T, CUT = 7, 3
CLOSE = 1e-12


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape) + 31 * seed), dtype=F64) - 0.3


class Opened(tttc.Variant):
    """A reading gate, a reading param and a reading token, beside what changes the weights; a window over q."""

    q = tttc.token("D", window="K")
    W = tttc.state("D", "D", init=tttc.normal(0.3))
    g = tttc.gate("g")
    scale = tttc.param("D", init=1.0)
    skip = tttc.token("D")
    mini_batch = 4
    update = tttc.sgd(lr=tttc.gate("lr"))

    def learner(self, x: Any) -> Any:
        return tttc.tanh(x @ self.W)

    def loss(self, k: Any, v: Any) -> Any:
        return 0.5 * tttc.sum((self.learner(k) - v) ** 2)

    def output(self, q: Any) -> Any:
        return self.g * self.scale * self.learner(tttc.mean(q, axis=0)) + self.skip


def opened(decode: str = "sums") -> tuple[Any, dict[str, Any]]:
    """A layer, and a call in which 4 q heads read 2 k, v heads, all that may have 4 heads having them."""
    layer = tttc.compile(Opened, {"D": 3, "K": 3}, F64, backend="torch", decode=decode)
    given: dict[str, Any] = {n: values(2, T, 2 if n in "kv" else 4, 3, seed=i) for i, n in enumerate("qkv")}
    given["gates"] = {"g": values(2, T, 4), "lr": values(2, T, 2).abs()}
    given["params"] = {"scale": values(4, 3)}
    given["tokens"] = {"skip": values(2, T, 4, 3)}
    return layer, given


def part(given: dict[str, Any], where: slice) -> dict[str, Any]:
    cut = {n: given[n][:, where] for n in "qkv"}
    for group in ("gates", "tokens"):
        cut[group] = {n: x[:, where] for n, x in given[group].items()}
    return cut | {"params": given["params"]}


@pytest.mark.parametrize("decode", ["sums", "rows"])
def test_what_only_reads_has_the_heads_of_q(decode):
    """As if k, v and the gates of the update had been repeated, and cut anywhere: token by token as well."""
    layer, given = opened(decode)
    repeated = given | {n: given[n].repeat_interleave(2, 2) for n in "kv"}
    repeated["gates"] = {"g": given["gates"]["g"], "lr": given["gates"]["lr"].repeat_interleave(2, 2)}
    wanted, final = layer(**repeated)
    z, state = layer(**given)
    assert relative_error(z, wanted) <= CLOSE
    assert relative_error(state.W.repeat_interleave(2, 1), final.W) <= CLOSE
    for cuts in ([CUT], list(range(1, T))):
        pieces, state = [], None
        for begin, end in zip([0, *cuts], [*cuts, T], strict=True):
            found, state = layer(**part(given, slice(begin, end)), state=state)
            pieces.append(found)
        assert relative_error(torch.cat(pieces, 1), wanted) <= CLOSE
        assert relative_error(state.W.repeat_interleave(2, 1), final.W) <= CLOSE


@pytest.mark.parametrize("name", ["lr", "v", "W", "state"])
def test_what_changes_the_weights_has_the_heads_of_k(name):
    layer, given = opened()
    if name == "lr":
        given["gates"]["lr"] = values(2, T, 4)
    elif name == "v":
        given["v"] = values(2, T, 4, 3)
    else:
        W = values(2, 4, 3, 3) if name == "W" else values(4, 3, 3)
        given["state"] = {"W": W}
    said = {"lr": "gate `lr`", "v": "token `v`"}.get(name, "state `W`")
    with pytest.raises(ShapeError, match=f"{said} has the 4 heads of q(.|\n)*Give it 2 heads"):
        layer(**given)


@pytest.mark.parametrize("name", LIBRARY)
def test_no_gate_of_the_library_is_averaged_or_dropped(name):
    """Each gate with the heads of q: the call equals its halves, or is refused."""
    variant = LIBRARY[name]
    variant = variant if variant.mini_batch in (1, "all") else variant.replace(mini_batch=4)
    layer = tttc.compile(variant, dims_of(variant, 3, 4), F64, backend="torch")
    declared = layer.signature
    shapes = {n: [layer.dims[d] for d in s.dims] for n, s in (declared.tokens | declared.gates).items()}
    for own in declared.gates:
        given: dict[str, Any] = {n: values(1, 8, 2 if n == "q" else 1, *shapes[n], seed=i) for i, n in enumerate("qkv")}
        given["tokens"] = {n: values(1, 8, 1, *shapes[n]) for n in declared.tokens if n not in "qkv"}
        given["gates"] = {n: values(1, 8, 2 if n == own else 1, *shapes[n]).abs() for n in declared.gates}
        given["params"] = None
        if ("gate", own) in layer._carried:
            with pytest.raises(ShapeError, match=f"gate `{own}` has the 2 heads of q"):
                layer(**given)
            continue
        whole, _ = layer(**given)
        first, state = layer(**part(given, slice(0, 4)))
        second, _ = layer(**part(given, slice(4, 8)), state=state)
        assert relative_error(torch.cat([first, second], 1), whole) <= CLOSE


def test_a_state_of_other_heads_is_refused():
    """What a call of grouped heads left, in a call of others: its last tokens of q are of 4 heads."""
    layer, given = opened()
    _, state = layer(**part(given, slice(0, CUT)))
    rest = part(given, slice(CUT, T))
    rest["q"], rest["params"] = rest["q"][:, :, ::2], None
    rest["gates"], rest["tokens"] = {n: x[:, :, :2] for n, x in rest["gates"].items()}, {"skip": rest["q"]}
    with pytest.raises(StateMismatch, match="tokens of `q` for a batch of 2 and 4 heads, this call has 2 and 2"):
        layer(**rest, state=state)


# -- states brought together -------------------------------------------------------------------------------------------


def linear(backend: str = "torch", **settings: Any) -> tuple[Any, Any]:
    layer = tttc.compile(LIBRARY["TTTLinear"].replace(mini_batch=4), {"D": 3}, F64, backend=backend, **settings)

    def call(tokens: int, state: Any = None, batch: int = 1, seed: int = 0, **more: Any) -> Any:
        x = values(batch, tokens, 1, 3, seed=seed)
        gates = {n: torch.full((batch, tokens, 1), 0.3, dtype=F64) for n in ("lr", "tau")}
        return layer(x, x, x, gates=gates, state=state, **more)

    return layer, call


def test_states_at_different_places_are_no_batch():
    """Refused with both places; the way out is right."""
    layer, call = linear()
    states = [call(n, seed=n)[1] for n in (3, 2)]
    with pytest.raises(StateMismatch, match=r"state 0 stands 3 (.|\n)*state 1 stands 2(.|\n)*PackedState\(states\)"):
        State.joined(states)
    x = values(1, 8, 1, 3)
    gates = {n: torch.full((1, 8, 1), 0.3, dtype=F64) for n in ("lr", "tau")}
    z, _ = layer(x, x, x, gates=gates, state=PackedState(tuple(states)), cu_seqlens=[0, 4, 8])
    for i, state in enumerate(states):
        own = slice(4 * i, 4 * i + 4)
        gate = {n: g[:, own] for n, g in gates.items()}
        assert relative_error(z[:, own], layer(x[:, own], x[:, own], x[:, own], gates=gate, state=state)[0]) <= CLOSE


def test_states_at_one_place_are_a_batch():
    layer, call = linear()
    states = [call(3, seed=n)[1] for n in (1, 2)]
    z, _ = call(2, State.joined(states), batch=2)
    x = values(2, 2, 1, 3)
    gates = {n: torch.full((1, 2, 1), 0.3, dtype=F64) for n in ("lr", "tau")}
    for i, state in enumerate(states):
        alone, _ = layer(x[i : i + 1], x[i : i + 1], x[i : i + 1], gates=gates, state=state)
        assert relative_error(z[i : i + 1], alone) <= CLOSE


def test_states_that_hold_different_things_are_no_batch():
    momentum = tttc.compile(LIBRARY["Titans"].replace(mini_batch=4), {"D": 3, "F": 4}, F64, backend="torch")
    x = values(1, 4, 1, 3)
    gates = {n: torch.full((1, 4, 1), 0.3, dtype=F64) for n in momentum.signature.gates}
    _, state = momentum(x, x, x, gates=gates)
    with pytest.raises(StateMismatch, match=r"the memory of state 0 are (.|\n)*state 1 none"):
        State.joined([state, State(state.weights)])
    with pytest.raises(StateMismatch, match="no states"):
        State.joined([])
    z, _ = momentum(  # each continues, and one of them begins to carry what it had not
        *3 * [torch.cat([x, x], 1)],
        gates={n: torch.cat([g, g], 1) for n, g in gates.items()},
        state=PackedState((state, State(state.weights))),
        cu_seqlens=[0, 4, 8],
    )
    assert relative_error(z[:, 4:], momentum(x, x, x, gates=gates, state=State(state.weights))[0]) <= CLOSE
    assert relative_error(z[:, :4], momentum(x, x, x, gates=gates, state=state)[0]) <= CLOSE


def test_telemetry_of_other_lengths_does_not_keep_states_apart():
    """It says what the last call did, not where a sequence stands."""
    _, call = linear(telemetry=True)
    states = [call(n)[1] for n in (4, 8)]
    assert set(State.joined(states).telemetry) == set()
    again = State.joined([states[0], states[0]])
    assert {n: len(x) for n, x in again.telemetry.items()} == dict.fromkeys(states[0].telemetry, 2)
    _, packed = call(12, cu_seqlens=[0, 4, 12])
    call(8, packed, cu_seqlens=[0, 4, 8])


def test_a_batch_of_states_is_that_of_as_many_packed_sequences():
    layer, call = linear()
    _, state = call(3, batch=2)
    x, gates = values(1, 4, 1, 3), {n: torch.full((1, 4, 1), 0.3, dtype=F64) for n in ("lr", "tau")}
    z, _ = layer(x, x, x, gates=gates, state=state, cu_seqlens=[0, 2, 4])
    for i in range(2):
        own = slice(2 * i, 2 * i + 2)
        gate = {n: g[:, own] for n, g in gates.items()}
        alone, _ = layer(x[:, own], x[:, own], x[:, own], gates=gate, state=state.select(i))
        assert relative_error(z[:, own], alone) <= CLOSE
    with pytest.raises(StateMismatch, match="a state with a batch of 2 is given for 4 packed sequences"):
        layer(x, x, x, gates=gates, state=dict(state), cu_seqlens=[0, 1, 2, 3, 4])
