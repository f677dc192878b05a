"""Self-attention as test-time training: against PyTorch's softmax attention and plain Nadaraya-Watson loops."""

from __future__ import annotations

import math
import re
import warnings
from functools import cache

import pytest
import sympy
import torch
from torch.nn.attention import flex_attention as flex

import tttc
from tttc.attention import AttentionLayer, NonParametric, SoftmaxAttention, compile_attention
from tttc.errors import DeclarationError, ShapeError, StateMismatch

exp, Max, Piecewise = sympy.exp, sympy.Max, sympy.Piecewise
KERNELS = {
    "exp": lambda s: exp(s),
    "exp_plus_one": lambda s: exp(s) + 1,
    "sigmoid": lambda s: 1 / (1 + exp(-s)),
    "square": lambda s: (1 + s / 4) ** 2 + sympy.Rational(1, 10),
    "bare_square": lambda s: (1 + s) ** 2,
    "gauss": lambda s: exp(-((s - 1) ** 2) / 2) / sympy.sqrt(2 * sympy.pi),
    "softplus": lambda s: sympy.log(1 + exp(s)),
    "relu": lambda s: Max(0, s),
    "relu_square": lambda s: 3 * Max(0, s) ** 2,
    "elu": lambda s: Piecewise((exp(s), s <= 0), (1 + s, True)),
    "wave": lambda s: exp(s) * sympy.cos(s) ** 2 + 0.1 * sympy.Abs(s),
    "powers": lambda s: 2**s + sympy.sqrt(1 + s**2) / 3,
    "constant": lambda s: 2,
}
READS = ("after", "before", "end")
TORCH = {"exp": torch.exp, "log": torch.log, "cos": torch.cos, "sqrt": lambda x: x**0.5, "pi": math.pi}


def declared(kernel, **settings):
    """A declaration with this kernel."""
    return type("Declared", (NonParametric,), {"kernel": lambda self, s: kernel(s), **settings})


@cache
def compiled(name="exp", read="after", D=4, dtype=torch.float64):
    return compile_attention(declared(KERNELS[name], read=read), {"D": D}, dtype)


def inputs(T, B=2, H=2, G=None, D=4, seed=0, scale=1.5, dtype=torch.float64):
    """q: [B, T, H, D], k and v: [B, T, G, D]."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (scale * torch.randn(B, T, heads, D, generator=generator, dtype=torch.float64)).to(dtype)
        for heads in (H, G or H, G or H)
    ]


def oracle(kernel, read, q, k, v, scale):
    """The definition: for every token, a sum over the tokens that it sees, with the user's own kernel."""
    s = sympy.Symbol("s", real=True)
    weight = sympy.lambdify(s, kernel(s), modules=[TORCH])
    group = q.shape[2] // k.shape[2]
    z = torch.zeros_like(q)
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            for t in range(q.shape[1]):
                top, total = torch.zeros_like(q[b, t, h]), torch.zeros((), dtype=q.dtype)
                for u in range({"after": t + 1, "before": t, "end": q.shape[1]}[read]):
                    w = weight(scale * (q[b, t, h] @ k[b, u, h // group]))
                    top, total = top + w * v[b, u, h // group], total + w
                if total != 0:
                    z = z.index_put(tuple(map(torch.tensor, (b, t, h))), top / total)
    return z


def with_gradients(function, tensors, seed=1):
    """The output, and the gradients of a random function of it."""
    leaves = [x.clone().requires_grad_() for x in tensors]
    z = function(*leaves)
    cotangent = torch.randn(z.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(z.dtype)
    return [z.detach(), *torch.autograd.grad(z, leaves, cotangent, allow_unused=True, materialize_grads=True)]


def close(found, wanted, tolerance=1e-12):
    assert len(found) == len(wanted)
    for x, y in zip(found, wanted, strict=True):
        assert x.shape == y.shape
        assert torch.isfinite(x).all()
        assert (x - y).norm() <= tolerance * max(1, y.norm())  # a gradient may be 0: one token reads its own v


def in_pieces(layer, tensors, cuts):
    """The sequence in several calls, each with the state of the one before."""
    state, outputs, ends = None, [], [*cuts, tensors[0].shape[1]]
    for begin, end in zip([0, *cuts], ends, strict=True):
        z, state = layer(*(x[:, begin:end] for x in tensors), state=state)
        outputs.append(z)
    return torch.cat(outputs, 1), state


# -- values and gradients ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [1, 2, 7, 130])
def test_the_exponential_kernel_is_softmax_attention(T):
    layer = compile_attention(SoftmaxAttention, {"D": 8}, torch.float64)
    tensors = inputs(T, B=2, H=3, D=8)

    def softmax_attention(q, k, v):
        heads = (x.transpose(1, 2) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2)

    wanted = with_gradients(softmax_attention, tensors)
    close(with_gradients(lambda *x: layer(*x)[0], tensors), wanted)
    close([layer(*tensors)[0]], wanted[:1])  # without gradients FlexAttention runs it


@pytest.mark.parametrize(
    ("name", "read"),
    [*((name, "after") for name in KERNELS), *((n, r) for n in ("exp", "sigmoid", "relu") for r in ("before", "end"))],
)
def test_every_kernel_equals_the_loops(name, read):
    layer, tensors = compiled(name, read), inputs(6)
    wanted = with_gradients(lambda *x: oracle(KERNELS[name], read, *x, 0.5), tensors)
    close(with_gradients(lambda *x: layer(*x)[0], tensors), wanted)
    close([layer(*tensors)[0]], wanted[:1])


@pytest.mark.parametrize("scale", [0.3, -2, 0, "1/D", "sqrt(D) / (2 * N)"])
def test_the_scale_is_a_number_or_an_expression_of_the_dims(scale):
    layer = compile_attention(declared(KERNELS["exp_plus_one"], scale=scale), {"D": 4, "N": 5}, torch.float64)
    number = {"1/D": 1 / 4, "sqrt(D) / (2 * N)": 1 / 5}.get(scale, scale)
    assert layer.scale == number
    tensors = inputs(4)
    close([layer(*tensors)[0]], [oracle(KERNELS["exp_plus_one"], "after", *tensors, number)])


@pytest.mark.parametrize("G", [1, 2, 6])
def test_a_head_of_k_and_v_serves_a_group_of_heads_of_q(G):
    layer, tensors = compiled("sigmoid"), inputs(5, H=6, G=G)
    wanted = with_gradients(lambda *x: oracle(KERNELS["sigmoid"], "after", *x, 0.5), tensors)
    close(with_gradients(lambda *x: layer(*x)[0], tensors), wanted)
    z, state = layer(*tensors)
    close([z], wanted[:1])
    assert state["k"].shape == state.v.shape == (2, G, 5, 4)


def test_gradients_of_gradients():
    tensors = [x.requires_grad_() for x in inputs(3, B=1, H=2, G=1, D=2)]
    layer = compiled("sigmoid", D=2)
    assert torch.autograd.gradcheck(lambda *x: layer(*x)[0], tensors)
    assert torch.autograd.gradgradcheck(lambda *x: layer(*x)[0], tensors)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.float16, 2e-3), (torch.bfloat16, 1.5e-2)]
)
@pytest.mark.parametrize("name", ["exp", "square", "sigmoid"])
def test_other_precisions(name, dtype, tolerance):
    layer, tensors = compiled(name, dtype=dtype), inputs(9, dtype=dtype)
    wanted = with_gradients(lambda *x: oracle(KERNELS[name], "after", *x, 0.5), [x.double() for x in tensors])
    found = with_gradients(lambda *x: layer(*x)[0], tensors)
    assert {x.dtype for x in (*found, layer(*tensors)[0], layer(*tensors)[1].k)} == {dtype}
    close([x.double() for x in found], wanted, 2 * tolerance)
    close([layer(*tensors)[0].double()], wanted[:1], tolerance)


# -- the state ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cuts", [[1], [4], [8], [0, 3, 3, 9], [2, 5, 7], list(range(1, 9))])
@pytest.mark.parametrize(("name", "read"), [("exp", "after"), ("sigmoid", "before")])
def test_calls_that_continue_equal_one_call(name, read, cuts):
    layer, tensors = compiled(name, read), inputs(9, H=4, G=2)
    whole, state = layer(*tensors)
    z, final = in_pieces(layer, tensors, cuts)
    close([z], [whole])
    assert all(torch.equal(final[n], state[n]) for n in ("k", "v"))
    close(
        with_gradients(lambda *x: in_pieces(layer, x, cuts)[0], tensors),
        with_gradients(lambda *x: layer(*x)[0], tensors),
    )


def test_the_state_is_a_copy_that_can_be_detached_and_given_as_a_dict():
    layer, (q, k, v) = compiled(), inputs(4, H=1)
    _, state = layer(q, k, v)
    kept = state.k.clone()
    k.zero_()
    assert torch.equal(state.k, kept)
    again = [layer(q, k, v, state=s)[0] for s in (state, state.detach(), {"k": state.k, "v": state.v})]
    assert torch.equal(again[0], again[1])
    assert torch.equal(again[0], again[2])


@pytest.mark.parametrize("read", READS)
def test_no_tokens(read):
    layer = compiled(read=read)
    q, k, v = (x.requires_grad_() for x in inputs(0, H=4, G=2))
    z, state = layer(q, k, v)
    assert z.shape == (2, 0, 4, 4)
    assert state.k.shape == (2, 2, 0, 4)
    z.sum().backward()
    assert q.grad.shape == q.shape
    _, state = layer(*inputs(3, H=4, G=2))
    z, after = layer(q, k, v, state=state)
    assert z.shape == (2, 0, 4, 4)
    assert torch.equal(after.k, state.k)
    assert layer(*inputs(3, B=0))[0].shape == (0, 3, 2, 4)


# -- who sees what -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("read", "own"), [("after", 0), ("before", 1)])
@pytest.mark.parametrize("name", ["exp", "relu"])
def test_causality_is_exact(name, read, own, training):
    layer, tensors, T, t = compiled(name, read), inputs(130), 130, 40
    changed = [x.clone() for x in tensors]
    for x, first in zip(changed, (t + 1, t + 1 - own, t + 1 - own), strict=True):
        x[:, first:] = 100 * torch.randn(2, T - first, 2, 4, dtype=torch.float64)
    leaves = [[x.requires_grad_(training) for x in group] for group in (tensors, changed)]
    z, other = (layer(*group)[0] for group in leaves)
    assert torch.equal(z[:, : t + 1], other[:, : t + 1])
    assert not torch.equal(z[:, t + 1], other[:, t + 1])
    if training:
        for x in torch.autograd.grad(z[:, : t + 1].sum(), tensors):
            assert not x[:, t + 1 :].any()


def test_end_sees_every_token_of_the_call():
    layer, (q, k, v) = compiled(read="end"), inputs(5)
    order = torch.tensor([3, 0, 4, 1, 2])
    close([layer(q, k[:, order], v[:, order])[0]], [layer(q, k, v)[0]])


def test_the_first_token_reads_zero_before_anything_is_seen():
    layer, tensors = compiled(read="before"), inputs(3)
    z, *gradients = with_gradients(lambda *x: layer(*x)[0], tensors)
    assert not z[:, 0].any()
    assert not layer(*tensors)[0][:, 0].any()
    assert not gradients[0][:, 0].any()
    one = [x[:, :1] for x in tensors]
    assert not layer(*one)[0].any()
    with pytest.warns(UserWarning, match="Anomaly Detection"), torch.autograd.detect_anomaly():  # no NaN on the way
        assert all(torch.isfinite(x).all() for x in with_gradients(lambda *x: layer(*x)[0], one))


# -- numbers at the edge -----------------------------------------------------------------------------------------------


def test_a_weight_of_zero_has_no_influence_and_no_gradient():
    layer = compile_attention(declared(KERNELS["bare_square"], scale=1), {"D": 1}, torch.float64)
    q = torch.ones(1, 3, 1, 1, dtype=torch.float64)
    k = torch.tensor([-1.0, 2.0, -1.0], dtype=torch.float64).reshape(1, 3, 1, 1)
    v = torch.tensor([5.0, 7.0, 9.0], dtype=torch.float64).reshape(1, 3, 1, 1)
    z, dq, dk, dv = with_gradients(lambda *x: layer(*x)[0], [q, k, v])
    assert (
        z.flatten().tolist() == layer(q, k, v)[0].flatten().tolist() == [0, 7, 7]
    )  # 0 / 0 = 0, then the one that counts
    assert torch.isfinite(dq).all()
    assert not dk[:, ::2].any()
    assert not dv[:, ::2].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["exp", "exp_plus_one", "sigmoid", "softplus", "elu"])
def test_large_scores_neither_overflow_nor_vanish(name, dtype):
    layer = compile_attention(declared(KERNELS[name], scale=1), {"D": 1}, dtype)
    q, k, v = (torch.tensor(x, dtype=dtype).reshape(1, 2, 1, 1) for x in ([1, 1], [-800, 800], [3, 5]))
    found = with_gradients(lambda *x: layer(*x)[0], [q, k, v])
    assert all(torch.isfinite(x).all() for x in found)
    assert found[0][0, 1].item() == layer(q, k, v)[0][0, 1].item() == 5


def test_scores_that_are_not_seen_may_overflow():
    layer = compile_attention(declared(lambda s: exp(exp(s)), scale=1), {"D": 1}, torch.float64)
    q, k, v = (torch.tensor(x, dtype=torch.float64).reshape(1, 2, 1, 1) for x in ([1, 0], [1, 800], [3, 5]))
    found = with_gradients(lambda *x: layer(*x)[0], [q, k, v])
    assert all(torch.isfinite(x).all() for x in found)
    assert found[0].flatten().tolist() == layer(q, k, v)[0].flatten().tolist() == [3, 4]


def test_outputs_where_the_kernel_turns_negative_are_nan_not_wrong():
    layer = compile_attention(declared(lambda s: 100 + s, scale=1), {"D": 1}, torch.float64)
    q, k, v = (torch.tensor(x, dtype=torch.float64).reshape(1, 1, 1, 1) for x in (1.0, -1000.0, 1.0))
    assert layer(q, k, v)[0].isnan().all()
    assert layer(q.requires_grad_(), k, v)[0].isnan().all()


# -- what runs, and what it says ---------------------------------------------------------------------------------------


def test_flex_attention_runs_where_no_gradient_is_recorded(monkeypatch):
    layer, tensors, calls = compiled("square"), inputs(3), []
    attend = layer._attend
    monkeypatch.setattr(layer, "_attend", lambda *x: calls.append(1) or attend(*x))
    wanted = layer(*tensors)[0]
    needing = [x.clone().requires_grad_() for x in tensors]
    with torch.no_grad():
        assert torch.equal(layer(*needing)[0], wanted)
    with torch.inference_mode():
        assert torch.equal(layer(*tensors)[0], wanted)
    assert len(calls) == 3
    assert layer(*needing)[0].requires_grad
    assert len(calls) == 3


def test_only_the_advice_to_compile_is_silenced(monkeypatch):
    layer, tensors = compiled(), inputs(3)
    monkeypatch.setattr(flex, "_WARNINGS_SHOWN", set(), raising=False)  # it is given once per process
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        layer(*tensors)
    assert not seen
    attend = layer._attend
    monkeypatch.setattr(layer, "_attend", lambda *x: warnings.warn("something else", UserWarning, 2) or attend(*x))
    with pytest.warns(UserWarning, match="something else"):
        layer(*tensors)


def test_the_generated_source_is_a_module_that_runs_by_itself():
    layer = compiled("wave")
    module = {}
    exec(layer.source, module)
    s = torch.linspace(-5, 5, 23, dtype=torch.float64)
    kernel = torch.exp(s) * torch.cos(s) ** 2 + 0.1 * s.abs()
    assert torch.allclose(module["score_mod"](s, 0, 0, 0, 0).exp(), kernel, rtol=1e-12)
    q, k, v = (x.transpose(1, 2) for x in inputs(4))
    mask = flex.create_block_mask(lambda b, h, t, u: t >= u, None, None, 4, 4, device="cpu")
    assert torch.equal(module["attend"](q, k, v, mask).transpose(1, 2), layer(*inputs(4))[0])


def test_layers_of_one_declaration_share_their_code():
    """FlexAttention is traced once for them, and its guards are few."""
    one, other = (compile_attention(SoftmaxAttention, {"D": 32}) for _ in range(2))
    assert one._made["score_mod"] is other._made["score_mod"]


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("exp", "score"),
        ("exp_plus_one", "torch.logaddexp(score, torch.full_like(score, 0))"),
        ("sigmoid", "-torch.logaddexp(torch.full_like(score, 0), -score)"),
        ("square", "torch.log((score/4 + 1)**2 + 1/10)"),
        ("bare_square", "2*log_or_nothing(torch.abs(score + 1))"),
        ("elu", "torch.where(score <= 0, score, log_or_nothing(score + 1))"),
    ],
)
def test_the_score_is_the_simplified_logarithm(name, line):
    source = compiled(name).source
    assert f"    return {line}\n" in source
    assert ("flex_attention(q, k, v, None, " in source) == (name == "exp")  # the identity is no modification


def test_it_says_what_it_is_and_what_runs():
    layer = compile_attention(SoftmaxAttention, {"D": 64})
    assert repr(layer) == "AttentionLayer(SoftmaxAttention: exp(s), {'D': 64}, torch.float32, cpu)"
    said = layer.explain()
    for part in (
        "Nadaraya-Watson learner (arXiv:2407.04620, Theorem 2)",
        "x_ts = 0.125 * <q_t, k_s>",
        'read="after"',
        "kernel(s) = exp(s), log kernel(s) = s",
        "training: the same score_mod and mask on scores [B, H, T, S] in memory, "
        "because FlexAttention has no backward on cpu; inference: FlexAttention",
        layer.source,
    ):
        assert part in said


@pytest.mark.filterwarnings(r"ignore:The \.grad attribute of a Tensor that is not a leaf")  # torch.compile's own look
def test_inside_a_compiled_module():
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.project, self.attention = torch.nn.Linear(4, 12).double(), compiled("square")

        def forward(self, x):
            q, k, v = self.project(x).chunk(3, -1)
            return 2 * self.attention(q, k, v)[0]

    block, x = Block(), inputs(5)[0]
    fused = torch.compile(block, backend="eager")
    close(with_gradients(fused, [x]), with_gradients(block, [x]))
    with torch.no_grad():
        close([fused(x)], [block(x)])


@pytest.mark.gpu
@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("name", ["exp", "sigmoid", "bare_square", "relu"])
def test_on_a_gpu(name, read):
    layer = compile_attention(declared(KERNELS[name], read=read), {"D": 16}, torch.float32, "cuda")
    tensors = inputs(150, H=4, G=2, D=16, scale=0.5)
    wanted = with_gradients(lambda *x: compiled(name, read, D=16)(*x)[0], tensors)
    on_gpu = [x.float().cuda() for x in tensors]
    found = with_gradients(lambda *x: layer(*x)[0].cpu(), on_gpu)
    close([x.cpu().double() for x in found], wanted, 2e-5)
    if read != "end":
        close([in_pieces(layer, on_gpu, [100, *range(140, 150)])[0].cpu().double()], wanted[:1], 2e-5)


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernel", "said"),
    [
        (lambda s: s, "kernel(-10) is -10"),
        (lambda s: -exp(s), "kernel(-10) is -0.0000454"),
        (lambda s: (s - 3) ** 2 - sympy.Rational(1, 100), "kernel(3) is -0.01"),
        (lambda s: 1 / s**2, "kernel(0) is not finite"),
        (lambda s: sympy.sqrt(s), "kernel(-10) is 3.162*I"),
        (lambda s: Piecewise((1, s < 2)), "kernel(2) is not finite"),
        (lambda s: 1 - sympy.erf(s), "comes out as"),
        (lambda s: s > 0, "it is s > 0"),
        (lambda s: None, "None"),
        (lambda s: "exp(s)", "'exp(s)'"),
        (lambda s: s**2 * sympy.Symbol("a"), "it is a*s**2"),
        (lambda s: torch.exp(s), "must be Tensor"),
        (lambda s: sympy.gamma(s) ** 2, "has no attribute 'gamma'"),
        (lambda s: 1 / 0, "division by zero"),
    ],
)
def test_a_kernel_that_gives_no_weights_is_refused(kernel, said):
    with pytest.raises(DeclarationError) as caught:
        compile_attention(declared(kernel), {"D": 4})
    text = str(caught.value)
    assert text.startswith("variant `Declared`: kernel(s): ")
    assert said in text
    assert "test_attention.py:" in text
    assert "return sympy.exp(s)" in text


def test_all_problems_of_a_declaration_are_listed():
    class Wrong(NonParametric):
        read = "start"
        scale = "1/sqrt(E)"

    with pytest.raises(DeclarationError) as caught:
        compile_attention(Wrong, {"D": 4}, torch.int64)
    for part in (
        "variant `Wrong` has 4 problems",
        "dtype is torch.int64",
        "read is 'start'.\n  It must be one of after, before, end.",
        "scale is '1/sqrt(E)': there is no dim E",
        "an expression of the dims, D, such as",
        "kernel(s): it is not declared",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize("scale", [float("nan"), "1/0", None, "D +", 1j])
def test_a_scale_that_is_no_number_is_refused(scale):
    with pytest.raises(DeclarationError, match=re.escape(f"variant `Declared`: scale is {scale!r}: ")):
        compile_attention(declared(KERNELS["exp"], scale=scale), {"D": 4})


def test_a_declaration_is_a_class_and_dims_are_positive():
    with pytest.raises(DeclarationError, match="subclass of NonParametric"):
        compile_attention(SoftmaxAttention(), {"D": 4})
    for dims in ({}, {"D": 0}, {"D": 4.0}, {"D": True}, {"D": 4, "N": -1}):
        with pytest.raises(ShapeError, match=r"variant `SoftmaxAttention`: [DN]=.*\n  Every dim is a positive int"):
            compile_attention(SoftmaxAttention, dims)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"q": lambda q: q[0]}, "q is torch.float64 [5, 6, 4]"),
        ({"q": lambda q: q[..., :3]}, "q has shape [2, 5, 6, 3], expected [2, 5, 6, 4]"),
        ({"k": lambda k: k[:1]}, "k has shape [1, 5, 2, 4], expected [2, 5, 2, 4]"),
        ({"k": lambda k: k[:, 1:]}, "k has shape [2, 4, 2, 4], expected [2, 5, 2, 4]"),
        ({"v": lambda v: v[:, :, :1]}, "v has shape [2, 5, 1, 4], expected [2, 5, 2, 4]"),
        ({"q": lambda q: q[:, :, :5]}, "q has 5 heads, k and v have 2"),
        (
            {"k": lambda k: k[:, :, :0], "v": lambda v: v[:, :, :0], "state": lambda _: None},
            "q has 6 heads, k and v have 0",
        ),
        (
            {"v": lambda v: v.float()},
            "v is torch.float32 [2, 5, 2, 4] on cpu.\n  The layer was compiled for torch.float64",
        ),
        ({"v": lambda v: v.to("meta")}, "v is torch.float64 [2, 5, 2, 4] on meta"),
        ({"v": lambda v: v.tolist()}, "v is a list"),
        ({"state": lambda _: {"k": torch.zeros(2, 2, 3, 4).double()}}, "found q, k, v, state k."),
        ({"state": lambda _: 3}, "found q, k, v, state int."),
        ({"state": lambda s: {**s, "v": s["v"][:, :, 1:]}}, "state v has shape [2, 2, 4, 4], expected [2, 2, 5, 4]"),
        ({"state": lambda s: s.map(lambda x: x[:1])}, "state k has shape [1, 2, 5, 4], expected [2, 2, 5, 4]"),
        ({"state": lambda s: s.to(torch.float32)}, "state k is torch.float32"),
    ],
)
def test_a_call_that_does_not_fit_is_refused(change, said):
    layer = compiled()
    good = dict(zip("qkv", inputs(5, H=6, G=2), strict=True))
    good["state"] = layer(*good.values())[1]
    good |= {name: function(good[name]) for name, function in change.items()}
    with pytest.raises(ShapeError) as caught:
        layer(**good)
    assert str(caught.value).startswith(f"variant `Declared`: {said}")
    assert "\n  " in str(caught.value)


def test_a_read_of_all_tokens_cannot_be_continued():
    layer, tensors = compiled(read="end"), inputs(3)
    _, state = layer(*tensors)
    with pytest.raises(StateMismatch, match=r"variant `Declared`: the 3 tokens already read"):
        layer(*tensors, state=state)


def test_compile_takes_a_kernel_like_any_declaration():
    """`tttc.compile` hands it on."""
    layer = tttc.compile(tttc.SoftmaxAttention, {"D": 8}, torch.float64)
    assert isinstance(layer, AttentionLayer)
    q, k, v = torch.randn(3, 1, 5, 2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wanted = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True
    ).transpose(1, 2)
    assert torch.allclose(layer(q, k, v)[0], wanted, rtol=0, atol=1e-12)
