"""`tttc.nn.EndToEnd`: equal to its definition, its sweep to its graph, its decoding to its whole pass."""

from __future__ import annotations

import copy
import pickle
from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import tttc
from tests import networks
from tttc.cli.main import app
from tttc.errors import DeclarationError, FileRefused, NonFinite, ShapeError, StateMismatch
from tttc.networks.decoding import NetworkState
from tttc.networks.end_to_end import EndToEnd

CLIPPED = tttc.sgd(lr=0.8, at_end=tttc.clip_norm(0.4, scope="all"))


def network(window: int = 5, chunk: int = 4, **options: Any) -> EndToEnd:
    return EndToEnd(*networks.modules(window), fast="*.prime.*", chunk=chunk, **options)


def tokens(batch: int, count: int) -> Tensor:
    return torch.randint(networks.VOCABULARY, (batch, count), generator=torch.Generator().manual_seed(1))


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters()}


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor], within: float = 1e-10) -> None:
    assert found.keys() == wanted.keys()
    for name, x in wanted.items():
        assert x.abs().max() > 0, name  # each is part of what is compared
        assert (found[name] - x).abs().max() <= within * x.abs().max(), name


@pytest.mark.parametrize("clip", [0.4, 100.0], ids=["clipped", "not clipped"])
@pytest.mark.parametrize("window", [3, 9], ids=["short window", "long window"])
@pytest.mark.parametrize("momentum", [0.0, 0.7])
def test_a_network_is_its_definition(window: int, clip: float, momentum: float) -> None:
    """Loss, loss of every token, and the gradient of every weight, of 2 sequences of 11 tokens in chunks of 4."""
    rule = tttc.sgd(lr=0.4, momentum=momentum or None, at_end=tttc.clip_norm(clip, scope="all"))
    model, given = network(window, update=rule), tokens(2, 12)
    out = model(given, rate=0.5)
    found = gradients(model, out.loss)
    own = [networks.definition(model.prefix, model.suffix, x, 4, 0.2, clip, momentum) for x in given]
    loss = (own[0][0] + own[1][0]) / 2
    assert torch.allclose(out.loss, loss, rtol=1e-12)
    assert torch.allclose(out.nll, torch.stack([each for _, each in own]), rtol=1e-10)
    assert_close(found, gradients(model, loss))


RULES = {
    "clip": CLIPPED,
    "momentum, decay": tttc.sgd(lr=0.7, momentum=0.9, decay=0.95, nesterov=True, at_end=tttc.clip_norm(0.3, "all")),
    "learned rates": tttc.sgd(lr=tttc.param(init=0.3), momentum=tttc.param(init=0.5), ema=True, at_end=tttc.muon(3)),
    "rates by pattern": tttc.sgd(lr={"*.inward": 0.3, "*": tttc.param(init=0.1)}),
    "weight norm": tttc.sgd(lr=0.5, at_end=[tttc.clip_norm(0.1), tttc.weight_norm(0)]),
    "accumulator": tttc.sgd(lr=0.5, at_end=tttc.power_norm(3.0)),
}


@pytest.mark.parametrize("name", RULES)
def test_the_sweep_is_the_graph(name: str) -> None:
    """For every rule, whatever is kept; the losses of tokens are differentiated too."""
    given, weight = tokens(3, 15), torch.linspace(0.0, 1.0, 14, dtype=torch.float64)
    model = network(backward="graph", update=RULES[name])

    def found(backward: str, keep: int) -> dict[str, Tensor]:
        model.backward, model.keep = backward, keep
        out = model(given)
        return gradients(model, out.loss + (weight * out.nll).mean())

    wanted = found("graph", 1)
    for keep in (1, 3):
        assert_close(found("sweep", keep), wanted)


@pytest.mark.parametrize("name", RULES)
def test_decoding_is_the_whole_pass(name: str, tmp_path: Any) -> None:
    """Token by token from inside a chunk, through a file, and one more token than the chunks hold."""
    model, given = network(update=RULES[name]), tokens(2, 14)
    wanted = model(given).nll
    state = model.prefill(given[:, :3])
    for t in range(3, 13):
        if t == 8:  # the second chunk is full, its step not taken
            path = state.save(tmp_path / "network.safetensors", model)
            state = NetworkState.load(path, model)
        logits, state = model.decode(given[:, t], state)
        nll = -logits.log_softmax(-1).gather(1, given[:, t + 1 : t + 2])[:, 0]
        assert torch.allclose(nll, wanted[:, t], rtol=1e-10), t
    at_once = model.prefill(given[:, :13])
    assert torch.allclose(at_once.logits, state.logits, rtol=1e-10)
    assert at_once.position == state.position == 13
    for n, w in at_once.fast.weights.items():
        assert torch.allclose(w, state.fast.weights[n], rtol=1e-10)


def test_what_is_masked_teaches_nothing() -> None:
    """A chunk counts the predictions that it is asked for; one without any has no part in the mean."""
    model, given = network(), tokens(2, 13)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[0, 4:8], mask[1, 5:7] = False, False
    out = model(given, mask=mask)
    assert (out.nll[~mask] == 0).all()
    assert (out.nll[mask] > 0).all()
    means = [
        out.nll[i, c : c + 4].sum() / mask[i, c : c + 4].sum() for i in (0, 1) for c in (0, 4, 8) if (i, c) != (0, 4)
    ]
    assert torch.allclose(out.loss, sum(means) / 5)
    skipped = torch.cat([given[:1, :4], given[:1, 4:8] * 0 + 3, given[:1, 8:]], 1)
    assert torch.allclose(model(skipped, mask=mask[:1]).nll[:, :3], out.nll[:1, :3])
    found = gradients(model, out.loss)
    model.backward = "graph"
    assert_close(gradients(model, model(given, mask=mask).loss), found)


def test_packed_documents_are_sequences_of_their_own() -> None:
    """Each begins with the weights of all; the loss is the mean over their chunks."""
    model, given = network(), tokens(1, 20)
    borders = [0, 9, 10, 13, 20]
    out = model(given, cu_seqlens=torch.tensor(borders))
    assert out.nll.shape == (1, 19)
    chunks = []
    for a, b in ((0, 9), (10, 13), (13, 20)):
        alone = model(given[:, a:b])
        assert torch.allclose(out.nll[:, a : b - 1], alone.nll, rtol=1e-12)
        chunks += alone.chunks[0].tolist()
    assert (out.nll[0, [8, 9, 12]] == 0).all()
    assert out.loss.item() == pytest.approx(sum(chunks) / len(chunks))
    found = gradients(model, out.loss)
    model.backward = "graph"
    assert_close(gradients(model, model(given, cu_seqlens=borders).loss), found)


def test_a_network_that_does_not_learn_is_its_modules() -> None:
    model, given = network(update=None), tokens(2, 12)
    hidden, _ = model.prefix(given[:, :-1], None)
    logits, _ = model.suffix(hidden, None)
    wanted = nn.functional.cross_entropy(logits.mT, given[:, 1:], reduction="none")
    loss = torch.stack([x.mean() for x in wanted.split(model.chunk, 1)]).mean()
    out, sizes = model(given), []
    assert torch.allclose(out.nll, wanted, rtol=1e-12)
    model.suffix.register_forward_pre_hook(lambda module, given: sizes.append(len(given[0])))
    assert_close(gradients(model, model(given).loss), gradients(model, loss))
    assert set(sizes) == {2}  # not mapped over sequences, which some operations of torch are slow under


def test_a_parameter_under_two_names_is_one() -> None:
    torch.manual_seed(0)
    prefix = networks.Prefix(5).double()
    model, given = EndToEnd(prefix, networks.Twice(5, prefix.table).double(), chunk=4), tokens(2, 12)
    assert list(model.fast_weights()) == ["blocks.0.prime.inward", "blocks.0.prime.outward"]
    found = gradients(model, model(given).loss)
    own = [networks.definition(model.prefix, model.suffix, x, 4, 1.0, 1.0)[0] for x in given]
    assert_close(found, gradients(model, sum(own) / 2))


class Dropping(networks.Suffix):
    """With something that is drawn."""

    def forward(self, h: Tensor, caches: Any) -> tuple[Tensor, Any]:
        return super().forward(nn.functional.dropout(h, 0.3, self.training), caches)


@pytest.mark.parametrize("cast", [False, True], ids=["float32", "autocast"])
def test_the_sweep_finds_what_surrounded_a_chunk(cast: bool) -> None:
    """What was drawn is drawn again, and autocast is on again, where a chunk is recorded in the backward."""
    torch.manual_seed(0)
    prefix = networks.Prefix(5)
    model = EndToEnd(prefix, Dropping(5, prefix.table), chunk=4, keep=2, update=CLIPPED)
    found = {}
    for model.backward in ("sweep", "graph"):
        torch.manual_seed(2)
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            loss = model(tokens(2, 12)).loss
        found[model.backward] = gradients(model, loss)
    assert_close(found["sweep"], found["graph"], 1e-2 if cast else 1e-5)


def test_a_backward_inside_autocast_is_of_the_forward_outside() -> None:
    """A chunk is recorded as it was run: without autocast, though it is on where the backward is asked for."""
    torch.manual_seed(0)
    prefix = networks.Prefix(5)
    model, given = EndToEnd(prefix, networks.Suffix(5, prefix.table), chunk=4), tokens(2, 12)
    wanted = gradients(model, model(given).loss)
    loss = model(given).loss
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(model, loss)
    own = [n for n in wanted if n.startswith("suffix.")]  # the prefix is differentiated by autograd, in bfloat16 there
    assert_close({n: found[n] for n in own}, {n: wanted[n] for n in own}, 1e-6)


def test_half_precision_weights_learn_in_float32() -> None:
    model = network().bfloat16()
    state = model.prefill(tokens(2, 9))
    assert {w.dtype for w in state.fast.weights.values()} == {torch.float32}
    out = model(tokens(2, 9))
    out.loss.backward()
    assert out.loss.dtype == torch.float32


@pytest.mark.parametrize("name", RULES)
def test_a_whole_network_is_copied_and_pickled(name: str) -> None:
    model, given = network(update=RULES[name]), tokens(2, 12)
    wanted = model(given).nll
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(given).nll, wanted)
        assert str(copied) == str(model)


def test_learns_in_inference_mode() -> None:
    """Where no gradient is asked for, or allowed, the inner ones are taken all the same."""
    model, given = network(), tokens(2, 14)
    wanted, state = model(given), model.prefill(given[:, :6])
    logits, _ = model.decode(given[:, 6:], state)
    with torch.inference_mode():
        inside = model(given + 0)
        assert torch.allclose(inside.nll, wanted.nll, rtol=1e-12)
        assert not inside.loss.requires_grad
        moved = model.prefill(given[:, :6]).to("cpu", copy=True)
        assert (model.decode(given[:, 6:] + 0, moved)[0] == logits).all()


@pytest.mark.parametrize("trained", ["suffix.*", "prefix.*", "*prime*"])
def test_what_is_frozen_has_no_gradient(trained: str) -> None:
    model, given = network(), tokens(2, 12)
    wanted = gradients(model, model(given).loss)
    model.zero_grad()
    for name, p in model.named_parameters():
        p.requires_grad_(fnmatchcase(name, trained))
    model(given).loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert_close(found, {n: x for n, x in wanted.items() if fnmatchcase(n, trained)})
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_tokens_that_are_drawn() -> None:
    """The likeliest each time, is what the whole pass finds likeliest."""
    model, given = network(), tokens(2, 5)
    found = model.generate(given, 6, temperature=0)
    assert found.shape == (2, 11)
    for t in range(5, 11):
        assert (model.prefill(found[:, :t]).logits.argmax(-1) == found[:, t]).all()
    drawn = [model.generate(given, 6, top_k=3, generator=torch.Generator().manual_seed(5)) for _ in range(2)]
    assert (drawn[0] == drawn[1]).all()


EXPLAINED = """\
fast weights      4 of 18 parameters, 120 of 490 numbers, one copy for each sequence: *.prime.*
                  blocks.0.prime.inward [6, 5]
                  blocks.0.prime.outward [5, 6]
                  blocks.1.prime.inward [6, 5]
                  blocks.1.prime.outward [5, 6]
every chunk       g = d/dW of the mean next-token loss of its 4 tokens, at the W they read
                  S <- mu S + g
                  W <- 0.99 W - rate * 0.5 * clip_norm(1, "all")(S)
a training step   per token 2.51 kFLOP forward and 7.97 kFLOP backward (T = 16, products alone)
                  2.04 times what it takes without learning, 5.15 kFLOP
a backward keeps  1.92 kB of fast weights and 960 B of caches per sequence at 2 of 4 chunks: 5.76 kB
                  and records one chunk at a time, keep=2
decoding carries  4.6 kB per sequence, at any length
"""


def test_explains_what_learns_what_it_costs_and_what_is_kept() -> None:
    rule = tttc.sgd(lr=0.5, momentum=tttc.param(init=0.9), decay=0.99, at_end=tttc.clip_norm(1.0, "all"))
    model = network(update=rule, keep=2)
    assert model.explain() == EXPLAINED
    assert all(p.grad is None for p in model.parameters())
    assert "nothing is learned" in network(update=None).explain(tokens=8)


def test_the_command_explains_a_network(tmp_path: Any, capsys: Any) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from tests import networks\nfrom tttc.nn import EndToEnd\n"
        "def model():\n    return EndToEnd(*networks.modules(5), chunk=4)\n"
    )
    result = CliRunner().invoke(app, ["explain", f"{file}:model"])
    assert result.exit_code == 0
    assert "4 of 17 parameters" in result.output


# -- what is refused ---------------------------------------------------------------------------------------------------


class Looking(networks.Suffix):
    """Sees all tokens at once."""

    def forward(self, h: Tensor, caches: Any) -> tuple[Tensor, Any]:
        return super().forward(h + h.mean(1, keepdim=True), caches)


class Bare(nn.Module):
    """Returns no caches."""

    def forward(self, tokens: Tensor, caches: Any) -> Tensor:
        return torch.zeros(*tokens.shape, networks.WIDTH, dtype=torch.float64)


def with_suffix(kind: type[networks.Suffix]) -> EndToEnd:
    torch.manual_seed(0)
    prefix = networks.Prefix(5)
    return EndToEnd(prefix, kind(5, prefix.table))


def with_buffer() -> EndToEnd:
    prefix, suffix = networks.modules(5)
    suffix.register_buffer("prime_scale", torch.ones(1))
    return EndToEnd(prefix, suffix, fast="prime_*")


REFUSED = {
    "no such name": (
        lambda: network().__class__(*networks.modules(5), fast="*.primes.*"),
        DeclarationError,
        "blocks.0.q",
    ),
    "a buffer": (with_buffer, DeclarationError, "only the buffer `prime_scale`"),
    "a gate": (lambda: network(update=tttc.sgd(lr=tttc.gate("lr"))), DeclarationError, "no gate of a token"),
    "a clip per token": (lambda: network(update=tttc.sgd(lr=1.0, clip=1.0)), DeclarationError, "clip_norm"),
    "Adam": (lambda: network(update=tttc.adam()), DeclarationError, "momentum"),
    "a pattern of no weight": (lambda: network(update=tttc.sgd(lr={"*.w": 1.0})), DeclarationError, "matches no fast"),
    "chunk 0": (lambda: network(chunk=0), DeclarationError, "chunk is 0"),
    "not causal": (lambda: with_suffix(Looking)(tokens(2, 9)), DeclarationError, "suffix is not causal"),
    "no caches": (lambda: EndToEnd(Bare(), networks.modules(5)[1])(tokens(2, 9)), DeclarationError, "h, caches"),
    "T = 0": (lambda: network()(tokens(2, 1)), ShapeError, "T = 0"),
    "no tokens to read": (lambda: network().prefill(tokens(2, 0)), ShapeError, "T >= 1"),
    "numbers that are not whole": (lambda: network()(torch.rand(2, 5)), ShapeError, "whole numbers"),
    "a mask of tokens": (lambda: network()(tokens(2, 5), mask=torch.ones(2, 5)), ShapeError, r"expected \[2, 4\]"),
    "borders": (lambda: network()(tokens(1, 5), cu_seqlens=[0, 4]), ShapeError, "rises from 0 to total"),
    "another batch": (lambda: network().decode(tokens(1, 1)[0], network().prefill(tokens(2, 3))), StateMismatch, "2"),
    "not finite": (
        lambda: network(update=tttc.sgd(lr=float("1e300")), check=True)(tokens(2, 13)),
        NonFinite,
        "inner steps had been taken",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_meaning_is_refused(name: str) -> None:
    made, kind, said = REFUSED[name]
    with pytest.raises(kind, match=said):
        made()


def test_a_state_of_another_network_is_refused(tmp_path: Any) -> None:
    model = network()
    path = model.prefill(tokens(2, 6)).save(tmp_path / "a.safetensors", model)
    with pytest.raises(FileRefused, match="another network"):
        NetworkState.load(path, network(chunk=5))
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)
    with pytest.raises(FileRefused, match="changed after it was written"):
        NetworkState.load(path, model)
