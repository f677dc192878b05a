"""The ready model of TTT-E2E: its blocks, windowed attention and cross-entropy, against plain definitions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import tttc
from tttc.errors import ShapeError
from tttc.models import e2e, window
from tttc.networks.cross_entropy import nll
from tttc.nn.rotation import rotated as rotated_in_layers

TINY = e2e.small(vocab=11, width=16, heads=2, blocks=2, suffix=1, ffn=24, prime=20, window=5, chunk=4)


def built(config=TINY, **options):
    torch.manual_seed(0)
    return e2e.build(config, **{"dtype": torch.float64, **options})


def tokens_of(config, T, B=2):
    return torch.randint(config.vocab, (B, T), generator=torch.Generator().manual_seed(1))


def through(model, tokens, sizes=None):
    """The logits of all tokens, given in parts of these sizes."""
    out, caches = [], (None, None)
    for part in tokens.split(sizes or [tokens.shape[1]], 1):
        h, first = model.prefix(part, caches[0])
        logits, second = model.suffix(h, caches[1])
        out.append(logits)
        caches = first, second
    return torch.cat(out, 1), caches


def defined(c, weights, tokens):
    """The network without learning, one head and one query at a time."""

    def norm(name, x):
        return x / ((x * x).mean(-1, keepdim=True) + c.eps).sqrt() * weights[f"{name}.weight"]

    def mlp(name, x):
        gate, up, down = (weights[f"{name}.{n}.weight"] for n in ("gate", "up", "down"))
        return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T

    def turned(x, t):
        angles = t * c.theta ** (-torch.arange(0, x.shape[-1], 2, dtype=x.dtype) / x.shape[-1])
        even, odd = x[..., 0::2], x[..., 1::2]
        pairs = even * angles.cos() - odd * angles.sin(), even * angles.sin() + odd * angles.cos()
        return torch.stack(pairs, -1).flatten(-2)

    def attention(name, x):
        D, out = c.width // c.heads, torch.zeros_like(x)
        q, (k, v) = x @ weights[f"{name}.q.weight"].T, (x @ weights[f"{name}.kv.weight"].T).split(c.width, -1)
        for head in range(c.heads):
            own = slice(head * D, head * D + D)
            Q, K = norm(f"{name}.q_norm", q[..., own]), norm(f"{name}.k_norm", k[..., own])
            for t in range(x.shape[1]):
                seen = range(max(0, t - c.window + 1), t + 1)
                scores = [(turned(Q[:, t], t) * turned(K[:, s], s)).sum(-1) / D**0.5 for s in seen]
                p = torch.stack(scores, -1).softmax(-1)
                out[:, t, own] = sum(p[:, i, None] * v[:, s, own] for i, s in enumerate(seen))
        return out @ weights[f"{name}.out.weight"].T

    x = weights["prefix.embedding.weight"][tokens]
    for name in ("prefix.blocks.0", "suffix.blocks.0"):
        x = x + norm(f"{name}.attention_post", attention(f"{name}.attention", norm(f"{name}.attention_norm", x)))
        if name.startswith("suffix"):
            x = x + norm(f"{name}.prime_post", mlp(f"{name}.prime", norm(f"{name}.prime_norm", x)))
        x = x + norm(f"{name}.ffn_post", mlp(f"{name}.ffn", norm(f"{name}.ffn_norm", x)))
    return norm("suffix.norm", x) @ weights["prefix.embedding.weight"].T


def test_a_model_of_two_blocks_is_its_definition():
    model, tokens = built(), tokens_of(TINY, 13)
    with torch.no_grad():
        for p in model.parameters():  # the norms too
            p.add_(0.1 * torch.randn(p.shape, dtype=p.dtype))
        assert (through(model, tokens)[0] - defined(TINY, model.state_dict(), tokens)).abs().max() < 1e-12


@pytest.mark.parametrize("short", [0, window._SHORT])
def test_caches_continue_a_sequence_at_any_token(monkeypatch, short):
    monkeypatch.setattr(window, "_SHORT", short)
    monkeypatch.setattr(window, "_CPU_ROWS", 3)
    model, tokens = built(), tokens_of(TINY, 17)
    whole, _ = through(model, tokens)
    for sizes in ([1] * 17, [4, 1, 7, 5], [2, 15], [16, 1]):
        parts, caches = through(model, tokens, sizes)
        assert (parts - whole).abs().max() < 1e-12
        held = [x for kv in (*caches[0], *caches[1]) for x in kv]
        assert all(x.shape == (2, 2, TINY.window, 8) and x.is_contiguous() for x in held)
        assert all(x.untyped_storage().nbytes() == x.numel() * 8 for x in held)


def test_a_prefix_in_pieces_and_with_checkpoints_has_the_same_gradient(monkeypatch):
    tokens, found = tokens_of(TINY, 14), []
    for piece, kept in [(512, False), (512, True), (3, False), (3, True), (6, True)]:
        monkeypatch.setattr(e2e, "_PIECE", piece)
        model = built(e2e.small(**{**vars(TINY), "suffix": 1, "blocks": 3, "checkpoint": kept}))
        h, caches = model.prefix(tokens[:, :4], None)
        more, caches = model.prefix(tokens[:, 4:], caches)
        out = torch.cat([h, more], 1), *caches[-1]
        found.append([*out, *torch.autograd.grad(sum((x**3).sum() for x in out), list(model.prefix.parameters()))])
    for other in found[1:]:
        assert all((a - b).abs().max() < 1e-9 for a, b in zip(other, found[0], strict=True))


def test_a_query_sees_itself_and_what_the_window_holds(monkeypatch):
    monkeypatch.setattr(window, "_CPU_ROWS", 3)
    monkeypatch.setattr(window, "_SHORT", 0)
    q, k, v = (torch.randn(1, 1, n, 4, dtype=torch.float64, requires_grad=True) for n in (7, 9, 9))
    for attend in (window.window_attention, window.window_attention_twice):
        for t in range(7):
            (seen,) = torch.autograd.grad(attend(q, k, v, 3)[:, :, t].sum(), v)
            assert seen.abs().sum((0, 1, 3)).nonzero().flatten().tolist() == [t, t + 1, t + 2]


def test_a_rotation_depends_on_how_far_apart_tokens_are():
    q, k = torch.randn(2, 1, 8, dtype=torch.float64).unbind()
    turns = window.rotation(1000, 8, 100.0, q)
    products = [
        (window.rotated(q, turns[t + 5, None]) * window.rotated(k, turns[t, None])).sum() for t in (0, 60, 130, 990)
    ]
    assert max(abs(p - products[0]) for p in products) < 1e-13
    x = torch.randn(1, 200, 3, 8)
    ours = window.rotated(x.transpose(1, 2), window.rotation(200, 8, 1e4, x)).transpose(1, 2)
    torch.testing.assert_close(ours, rotated_in_layers(x, torch.arange(200), 1e4))


@pytest.mark.parametrize(("short", "rows"), [(0, 2), (0, 64), (10**6, 64)])
def test_the_derivatives_of_windowed_attention_are_those_of_its_values(monkeypatch, short, rows):
    monkeypatch.setattr(window, "_SHORT", short)
    monkeypatch.setattr(window, "_CPU_ROWS", rows)
    torch.manual_seed(0)
    given = [torch.randn(2, 1, 2, n, 2, dtype=torch.float64, requires_grad=True) for n in (3, 5, 5)]

    def mapped(*tensors):
        return torch.vmap(lambda q, k, v: window.window_attention_twice(q, k, v, 3))(*tensors)

    torch.testing.assert_close(mapped(*given), window.window_attention(*given, 3))
    assert torch.autograd.gradcheck(mapped, given)
    assert torch.autograd.gradgradcheck(mapped, given)


def test_the_derivatives_of_the_cross_entropy_are_those_of_its_values():
    logits, targets = (
        torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True),
        torch.tensor([[0, 4, 2], [2, 2, 1]]),
    )

    def mapped(logits):
        return torch.vmap(nll)(logits, targets)

    ours = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(2, 3)
    torch.testing.assert_close(mapped(logits), ours)
    assert torch.autograd.gradcheck(mapped, logits)
    assert torch.autograd.gradgradcheck(mapped, logits)
    half = logits.detach().bfloat16().requires_grad_()
    torch.testing.assert_close(nll(half, targets), nll(half.float(), targets), rtol=0, atol=0)


def test_what_learns_are_the_three_matrices_of_the_second_mlp():
    model = built(e2e.small(blocks=3, suffix=2))
    assert list(model.prefill(tokens_of(TINY, 3)).fast.weights) == [
        f"blocks.{i}.prime.{name}.weight" for i in range(2) for name in ("gate", "up", "down")
    ]
    assert model.suffix.head.weight is model.prefix.embedding.weight
    assert not any("prime" in n for n, _ in model.prefix.named_parameters())
    baseline = built(e2e.small(blocks=3, suffix=2), learn=False)
    assert baseline.update is None
    assert [n for n, _ in baseline.named_parameters()] == [n for n, _ in model.named_parameters()]


class Gated(tttc.Variant):
    """The SwiGLU MLP of the model, declared."""

    W1, W3 = tttc.state("D", "F", init=tttc.normal(0.1)), tttc.state("D", "F", init=tttc.normal(0.1))
    W2 = tttc.state("F", "D", init=tttc.normal(0.1))

    def learner(self, x):
        return (tttc.silu(x @ self.W1) * (x @ self.W3)) @ self.W2


def test_a_declared_learner_takes_the_place_of_the_mlp_that_learns():
    tokens = tokens_of(TINY, 14)
    own = built()
    other = built(prime=lambda width, hidden: tttc.nn.Learner(Gated, dims={"D": width, "F": hidden}))
    other.load_state_dict(own.state_dict(), strict=False)
    pairs = {"W1": "gate", "W3": "up", "W2": "down"}
    with torch.no_grad():
        for name, matrix in pairs.items():
            getattr(other.suffix.blocks[0].prime, name).copy_(getattr(own.suffix.blocks[0].prime, matrix).weight.T)
    for model in (own, other):
        model(tokens).loss.backward()
    torch.testing.assert_close(other(tokens).nll, own(tokens).nll, rtol=0, atol=1e-12)
    torch.testing.assert_close(other.prefix.embedding.weight.grad, own.prefix.embedding.weight.grad)
    for name, matrix in pairs.items():
        found = getattr(other.suffix.blocks[0].prime, name).grad
        torch.testing.assert_close(found, getattr(own.suffix.blocks[0].prime, matrix).weight.grad.T)


def kept_by(function):
    """The tensors that autograd keeps for the backward of what the function does."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        function()
    return kept


def test_second_derivatives_keep_the_arguments_alone(monkeypatch):
    monkeypatch.setattr(window, "_SHORT", 0)
    q, k, v = (torch.randn(2, 2, n, 4, requires_grad=True) for n in (30, 50, 50))
    logits = torch.randn(6, 9, requires_grad=True)

    def attend():
        torch.autograd.grad(window.window_attention_twice(q, k, v, 21).sum(), (q, k, v), create_graph=True)

    def lose():
        torch.autograd.grad(nll(logits, torch.arange(6)).sum(), logits, create_graph=True)

    assert max(x.numel() for x in kept_by(attend)) <= k.numel()
    assert {x.data_ptr() for x in kept_by(lose) if x.numel() >= logits.numel()} == {logits.data_ptr()}


def test_blocks_of_a_prefix_keep_nothing_inside(monkeypatch):
    monkeypatch.setattr(e2e, "_PIECE", 8)
    kept = {}
    for kept_inside in (False, True):
        model = built(e2e.small(blocks=3, suffix=1, window=8, checkpoint=not kept_inside), dtype=torch.float32)
        tokens = tokens_of(model.prefix.config, 32)
        found = {x.untyped_storage().data_ptr(): x.numel() for x in kept_by(lambda: model.prefix(tokens, None))}  # noqa: B023
        kept[kept_inside] = sum(found.values())
    assert kept[False] < 3 * 2 * 32 * 64 < kept[True] / 10


def test_bfloat16_is_for_products_alone(monkeypatch):
    monkeypatch.setattr(window, "_SHORT", 0)
    losses, gradients = [], []
    for compute in (torch.bfloat16, None):
        model = built(e2e.small(window=12, chunk=8, compute=compute), dtype=torch.float32)
        out = model(tokens_of(model.prefix.config, 33))
        out.loss.backward()
        assert all(p.dtype == p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())
        losses.append(out)
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        state = model.prefill(tokens_of(model.prefix.config, 20))
        assert {x.dtype for kv in (*state.prefix_caches, *state.suffix_caches) for x in kv} == {
            compute or torch.float32
        }
        assert all(w.dtype == torch.float32 for w in state.fast.weights.values())
        assert state.logits.dtype == (compute or torch.float32)
    assert losses[0].nll.dtype == torch.float32
    torch.testing.assert_close(losses[0].nll, losses[1].nll, rtol=0, atol=0.06)
    assert not torch.equal(losses[0].nll, losses[1].nll)
    assert F.cosine_similarity(*gradients, dim=0) > 0.99


def test_sizes_that_do_not_fit_are_refused_together():
    with pytest.raises(ShapeError, match=r"width 30 is not 4 heads") as raised:
        e2e.small(width=30, suffix=4)
    assert "suffix is 4 of 3 blocks" in str(raised.value)
    with pytest.raises(ShapeError, match="chunk is 0, not a whole number from 1"):
        e2e.small(chunk=0)
