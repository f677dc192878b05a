"""Self-attention as test-time training: a non-parametric learner with a kernel of the user's own, on FlexAttention.

The learner keeps every pair (k_s, v_s) and reads by Nadaraya-Watson regression (arXiv:2407.04620, Theorem 2):

    f(q) = sum_s kernel(scale * <q, k_s>) * v_s / sum_s kernel(scale * <q, k_s>),    0 / 0 = 0

A non-negative kernel is exp(log kernel), so this is a softmax over the scores log kernel(s): PyTorch's `flex_attention`
with a `score_mod` printed from SymPy's formula of the logarithm. kernel(s) = exp(s) is softmax attention.
"""

from __future__ import annotations

import functools
import linecache
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch
from sympy.printing.str import StrPrinter
from torch.nn.attention.flex_attention import create_block_mask

from tttc.declare.arithmetic import calculated
from tttc.errors import DeclarationError, Problem, ShapeError, SourceLine, StateMismatch, problems_text
from tttc.runtime.graphs import outside_graphs
from tttc.runtime.layer import State

FLEX_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LAST_KEYS = {"after": 0, "before": -1, "end": math.inf}  # the last key that a query sees, from its own token on
s = sympy.Symbol("s", real=True)
logaddexp = type("logaddexp", (sympy.Function,), {"nargs": (2,), "is_real": True})  # log(exp(a) + exp(b)), kept whole

GUARD = """
def log_or_nothing(x):  # where the kernel is 0, which is its minimum, the score is -inf and has no gradient
    return torch.where(x == 0, -torch.inf, torch.log(torch.where(x == 0, 1.0, x)))

"""


class NonParametric:
    """Base class of a learner that keeps its training set: a kernel, and the tokens that a query sees.

    `read` is "after" (the tokens up to and with its own), "before" (strictly earlier ones; the first reads 0) or "end"
    (all tokens of the call: not causal). `scale` is a number or an expression of the dims.
    """

    read: str = "after"
    scale: float | str = "1/sqrt(D)"

    def kernel(self, s: Any) -> Any:
        """A SymPy expression in s = scale * <q, k>, nowhere negative; a pair with kernel 0 does not count."""
        raise NotImplementedError("it is not declared")


class SoftmaxAttention(NonParametric):
    """Softmax attention as test-time training with a Nadaraya-Watson learner (arXiv:2407.04620, Theorem 2)."""

    def kernel(self, s: Any) -> Any:
        return sympy.exp(s)


def compile_attention(
    variant: type[NonParametric],
    dims: Mapping[str, int],
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> AttentionLayer:
    """Compile a non-parametric learner into a layer.

    Args:
        variant: a subclass of `NonParametric`. Its kernel is evaluated at s = -10, -9.75, ..., 10, where it must not be
            negative; where it is negative elsewhere, the outputs are NaN.
        dims: {"D": the width of q, k and v}, and any other name that `scale` uses.
        dtype: of q, k, v, z and the state: float64, float32, bfloat16 or float16.
        device: where the tensors of a call are.

    Raises:
        DeclarationError, with every problem of the declaration; ShapeError, if a dim is missing or not positive.
    """
    if not (isinstance(variant, type) and issubclass(variant, NonParametric)):
        raise DeclarationError(f"{variant!r} is no declaration.\n  Pass a subclass of NonParametric: the class itself.")
    for dim, size in {"D": None, **dims}.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ShapeError(f"variant `{variant.__name__}`: {dim}={size!r}.\n  Every dim is a positive int.")
    return AttentionLayer(variant, dict(dims), dtype, torch.device(device))


class AttentionLayer:
    """A compiled non-parametric learner: `z, state = layer(q, k, v, state=state)`; made by `compile_attention`.

    Attributes: `kernel` and `log_kernel` (SymPy, of the symbol s), `source`, `scale`, `variant`, `dims`.
    """

    def __init__(self, variant: type[NonParametric], dims: dict[str, int], dtype: torch.dtype, device: torch.device):
        self.variant, self.dims, self.dtype, self.device, self.scale = variant, dims, dtype, device, 1.0
        problems = []
        for name, setting, legal in (("dtype", dtype, FLEX_DTYPES), ("read", variant.read, [*LAST_KEYS])):
            if setting not in legal:
                problems.append(Problem(f"{name} is {setting!r}.", f"It must be one of {', '.join(map(str, legal))}."))
        try:
            given = variant.scale
            self.scale = float(calculated(given, dims) if isinstance(given, str) else given)
            if not math.isfinite(self.scale):
                raise ValueError(f"that is {self.scale}")
        except Exception as reason:
            remedy = f'It must be a finite number or an expression of the dims, {", ".join(dims)}, such as "1/sqrt(D)".'
            problems.append(Problem(f"scale is {variant.scale!r}: {reason}.", remedy))
        try:
            self.kernel = sympy.sympify(object.__new__(variant).kernel(s), strict=True)
            if not isinstance(self.kernel, sympy.Expr) or self.kernel.free_symbols - {s}:
                raise ValueError(f"it is {self.kernel}")
            self.log_kernel = _log(self.kernel.rewrite((sympy.Max, sympy.Min), sympy.Piecewise))
            self.source, self._made = _generate(variant.__name__, self.kernel, self.log_kernel, self.scale)
        except Exception as reason:
            remedy = "It must return a SymPy expression of its argument, finite and not negative: return sympy.exp(s)."
            code = getattr(variant.kernel, "__code__", None)
            where = SourceLine(code.co_filename, code.co_firstlineno) if code else None
            problems.append(Problem(f"kernel(s): {reason}.", remedy, where))
        if problems:
            raise DeclarationError(problems_text(variant.__name__, problems))
        self._attend = torch.compile(self._made["attend"]) if device.type == "cuda" else self._made["attend"]

    def __deepcopy__(self, memo: Any) -> AttentionLayer:
        return self  # nothing of it is trained, or changed by a call

    def __reduce__(self) -> tuple[Any, ...]:
        return compile_attention, (self.variant, self.dims, self.dtype, self.device)

    def __repr__(self) -> str:
        return f"AttentionLayer({self.variant.__name__}: {self.kernel}, {self.dims}, {self.dtype}, {self.device})"

    def explain(self) -> str:
        """The learner, what runs on this device and why, and the generated code."""
        flex = f"FlexAttention, {'compiled' if self.device.type == 'cuda' else 'not compiled'}"
        memory = "the same score_mod and mask on scores [B, H, T, S] in memory, because FlexAttention "
        ways = {way: self._not_flex(way == "training") for way in ("training", "inference")}
        return f"""{self.variant.__name__}: {(self.variant.__doc__ or "").strip()}
z_t = sum_s kernel(x_ts) * v_s / sum_s kernel(x_ts), x_ts = {self.scale} * <q_t, k_s>, read="{self.variant.read}"
state: k and v of all tokens so far, {2 * self.dims["D"]} numbers per token and head of k
on {self.device}: {"; ".join(f"{way}: {memory + why if why else flex}" for way, why in ways.items())}

{self.source}"""

    @outside_graphs("FlexAttention is compiled here, by itself: torch.compile takes the module around it.")
    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, state: Mapping[str, torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, State]:
        """Run over the tokens; differentiable in q, k, v and the state. On a CPU, training holds all T * S scores.

        Args:
            q: [B, T, H, D] in the dtype of the layer.
            k, v: [B, T, G, D], where H is a multiple of G: each of their heads serves H / G heads of q.
            state: what a previous call returned, or {"k": ..., "v": ...} of [B, G, S, D] each: the tokens before these.

        Returns:
            z: [B, T, H, D], and the state after the last token: k and v of all tokens, [B, G, S + T, D] each.

        Raises:
            ShapeError; StateMismatch, if tokens follow a state although each reads all of them (`read="end"`).
        """
        past = {} if state is None else state if isinstance(state, Mapping) else {type(state).__name__: state}
        if problem := self._misfit({"q": q, "k": k, "v": v, **{f"state {name}": x for name, x in past.items()}}):
            raise ShapeError(f"variant `{self.variant.__name__}`: {problem}")
        offset, T = past["k"].shape[2] if past else 0, q.shape[1]
        if offset and T and self.variant.read == "end":
            what = f'the {offset} tokens already read would have had to see these: read="end"'
            raise StateMismatch(f"variant `{self.variant.__name__}`: {what}.\n  Give all tokens in one call.")
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        k, v = (torch.cat([past[name], x] if past else [x], 2) for name, x in (("k", k), ("v", v)))
        last = offset + LAST_KEYS[self.variant.read]
        training = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
        if q.numel() == 0 or self._not_flex(training):
            z = _in_memory(q, k, v, self._made["score_mod"], last, self.scale)
        else:
            mask = _block_mask(T, offset + T, last, self.device)
            with warnings.catch_warnings():  # off the GPU, compiling takes seconds per kernel and has no float64
                warnings.filterwarnings("ignore", "flex_attention called without torch.compile", UserWarning)
                # It refuses what requires a gradient even where none is recorded.
                z = self._attend(*(x if training else x.detach() for x in (q, k, v)), mask)
        return z.transpose(1, 2), State({"k": k, "v": v})

    def _not_flex(self, training: bool) -> str:
        """Why FlexAttention cannot run a call; empty if it can."""
        if self.device.type != "cuda":
            return f"has no backward on {self.device.type}" if training else ""
        return "sums in float32" if self.dtype == torch.float64 else "needs D >= 16" if self.dims["D"] < 16 else ""

    def _misfit(self, given: Mapping[str, Any]) -> str:
        """What is wrong with the tensors of a call, and the way out; empty if nothing is."""
        if set(given) - {"q", "k", "v"} not in (set(), {"state k", "state v"}):
            return f"found {', '.join(given)}.\n  A state has k and v: pass what a call of this layer returned."
        for name, x in given.items():
            if not isinstance(x, torch.Tensor):
                return f"{name} is a {type(x).__name__}.\n  Pass a torch.Tensor."
            if x.dim() != 4 or (x.dtype, x.device.type) != (self.dtype, self.device.type):
                compiled = f"The layer was compiled for {self.dtype} on {self.device}; a tensor has 4 axes."
                return f"{name} is {x.dtype} {list(x.shape)} on {x.device}.\n  {compiled}"
        (B, T, H, _), G, D = given["q"].shape, given["k"].shape[2], self.dims["D"]
        stored = [B, G, given["state k"].shape[2], D] if "state k" in given else []
        for name, x in given.items():
            expected = {"q": [B, T, H, D], "k": [B, T, G, D], "v": [B, T, G, D]}.get(name, stored)
            if list(x.shape) != expected:
                whence = f"B={B} and T={T} are those of q, D={D} that of dims=, {G} the heads of k."
                return f"{name} has shape {list(x.shape)}, expected {expected}.\n  {whence}"
        good = G > 0 and H % G == 0
        return "" if good else f"q has {H} heads, k and v have {G}.\n  Each of theirs serves a whole number of q's."


@functools.lru_cache(maxsize=8)
@torch.inference_mode(False)  # what is kept must also serve a later backward
def _block_mask(tokens: int, keys: int, last: float, device: torch.device) -> Any:
    """The blocks of keys that the queries see; None for all of them."""
    if last >= keys - 1:
        return None
    create = torch.compile(create_block_mask) if device.type == "cuda" else create_block_mask
    limit = torch.full((), int(last), device=device)  # as a number, every other one would compile anew
    return create(lambda b, h, q_idx, kv_idx: kv_idx <= q_idx + limit, None, None, tokens, keys, device)


def _in_memory(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, score_mod: Callable[..., torch.Tensor], last: float, scale: float
) -> torch.Tensor:
    """What `flex_attention` computes, in plain operations of PyTorch."""
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    k, v = (x.to(compute).repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    t, u = torch.arange(q.shape[2], device=q.device)[:, None], torch.arange(k.shape[2], device=q.device)
    seen = u <= t + last
    scores = torch.where(seen, scale * (q.to(compute) @ k.transpose(-1, -2)), 0.0)  # unseen: a finite derivative
    scores = torch.where(seen, score_mod(scores, 0, 0, t, u), -math.inf)
    some = (scores != -math.inf).any(-1, keepdim=True)
    weights = torch.where(some, torch.softmax(torch.where(some, scores, 0.0), -1), 0.0)  # 0 / 0 = 0
    return (weights @ v).to(q.dtype)


def _log(kernel: sympy.Expr) -> sympy.Expr:
    """The logarithm, taken apart as far as signs allow; of a sum with exponentials it is `logaddexp`: no overflow."""
    if isinstance(kernel, sympy.exp):
        return kernel.args[0]
    if kernel.is_Pow and (kernel.base.is_nonnegative or kernel.exp.is_even):
        return kernel.exp * _log(kernel.base if kernel.base.is_nonnegative else sympy.Abs(kernel.base))
    if kernel.is_Mul and all(factor.is_nonnegative for factor in kernel.args):
        return sympy.Add(*map(_log, kernel.args))
    if kernel.is_Add and kernel.has(sympy.exp) and kernel.is_positive and all(x.is_nonnegative for x in kernel.args):
        return functools.reduce(logaddexp, map(_log, kernel.as_ordered_terms()))
    if isinstance(kernel, sympy.Piecewise):
        return sympy.Piecewise(*((_log(value), condition) for value, condition in kernel.args))
    return -sympy.oo if kernel.is_zero else sympy.log(kernel.replace(sympy.log, _log))


class _Printer(StrPrinter):
    """A formula as Python on tensors: every function by its name in torch, numbers with all their digits."""

    _print_Pow = functools.partialmethod(StrPrinter._print_Pow, rational=True)

    def _print(self, e: Any, **settings: Any) -> str:
        if isinstance(e, sympy.Expr) and e.is_number and not e.is_Rational:
            return repr(float(e)).replace("inf", "torch.inf")
        return super()._print(e, **settings)

    def _tensor(self, e: Any) -> str:
        return f"torch.full_like(score, {self._print(e)})" if e.is_number else self._print(e)

    def _print_Function(self, e: Any) -> str:
        guarded = e.func is sympy.log and not e.args[0].is_positive
        name = "log_or_nothing" if guarded else f"torch.{e.func.__name__.lower()}"
        return f"{name}({', '.join(map(self._tensor, e.args))})"

    def _print_Piecewise(self, e: Any) -> str:
        text = "torch.full_like(score, torch.nan)"
        for value, where in reversed([(self._tensor(value), self._print(condition)) for value, condition in e.args]):
            text = value if where == "True" else f"torch.where({where}, {value}, {text})"
        return text


@functools.cache  # so that the layers of a model share their code, and what is compiled from it
def _generate(name: str, kernel: sympy.Expr, log_kernel: sympy.Expr, scale: float) -> tuple[str, dict[str, Any]]:
    """The source that runs the learner and what it defines, compared with the kernel at moderate arguments."""
    modified = "score_mod" if log_kernel != s else "None"  # the identity
    text = _Printer()._tensor(log_kernel.xreplace({s: sympy.Symbol("score", real=True)}))
    source = f'''"""{name}: kernel(s) = {kernel}, log kernel(s) = {log_kernel}."""

import torch
from torch.nn.attention.flex_attention import flex_attention

{GUARD if "log_or_nothing" in text else ""}
def score_mod(score, b, h, q_idx, kv_idx):
    return {text}


def attend(q, k, v, block_mask):
    return flex_attention(q, k, v, {modified}, block_mask, scale={scale!r}, enable_gqa=True)
'''
    file, made = f"<tttc {name}>", dict[str, Any]()  # no module: torch.compile would import it by its name
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    exec(compile(source, file, "exec"), made)
    grid = [sympy.Rational(i, 4) for i in range(-40, 41)]
    scores = made["score_mod"](torch.tensor(grid, dtype=torch.float64), 0, 0, 0, 0).tolist()
    for x, score in zip(grid, scores, strict=True):
        value = sympy.N(kernel.subs(s, x))
        if not (value.is_nonnegative and value.is_finite):
            raise ValueError(f"kernel({x}) is {sympy.N(value, 4) if value.is_finite else 'not finite'}")
        wanted = float(sympy.log(value)) if value else -math.inf
        if not math.isclose(score, wanted, rel_tol=1e-6, abs_tol=1e-6):
            raise ValueError(f"log kernel({x}) is {wanted}, but comes out as {score} in float64")
    return source, made
