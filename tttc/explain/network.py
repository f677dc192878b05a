"""`model.explain()` of a network that learns at test time: which weights are fast, what a step costs, what is kept.

fast weights      3 of 44 parameters, 393 k of 3.02 M numbers, one copy for each sequence: *.prime.*
                  blocks.0.prime.w1 [256, 512]
every chunk       g = d/dW of the mean next-token loss of its 256 tokens, at the W they read
                  W <- W - rate * 1 * clip_norm(1, "all")(g)
a training step   per token 12.5 MFLOP forward and 21.9 MFLOP backward (T = 4096, products alone)
                  1.31 times what it takes without learning, 26.2 MFLOP
a backward keeps  1.57 MB of fast weights and 524 kB of caches per sequence at 16 of 16 chunks: 33.5 MB
decoding carries  3.1 MB per sequence, at any length
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import flop_registry

from tttc.declare.specs import ParamSpec

if TYPE_CHECKING:
    from tttc.networks.end_to_end import EndToEnd

SHOWN_WEIGHTS = 6


class Flops(TorchDispatchMode):
    """Counts the floating-point operations of products, as `torch.utils.flop_counter` does for each operator."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        self.total += 0 if count is None else count(*args, **(kwargs or {}), out_val=out)
        return out


def explain_network(model: EndToEnd, tokens: int) -> str:
    """The text for sequences of so many tokens; nothing is computed, only shapes."""
    lines = [*_weights(model), *_rule(model), *_costs(model, tokens), *_memory(model, tokens)]
    width = max(len(title) for title, _ in lines) + 2
    return "\n".join(f"{title:{width}}{text}".rstrip() for title, text in lines) + "\n"


Lines = list[tuple[str, str]]


def _weights(model: EndToEnd) -> Lines:
    fast, every = model.fast_weights(), dict(model.named_parameters())
    if model.update is None:
        return [("fast weights", "none: update=None, so that nothing is learned at test time")]
    few, all_ = (_count(sum(p.numel() for p in group.values())).strip() for group in (fast, every))
    title = f"{len(fast)} of {len(every)} parameters, {few} of {all_} numbers, one copy for each sequence"
    shown = [("", f"{n} {list(p.shape)}") for n, p in list(fast.items())[:SHOWN_WEIGHTS]]
    rest = [("", f"... and {len(fast) - SHOWN_WEIGHTS} more")] if len(fast) > SHOWN_WEIGHTS else []
    return [("fast weights", f"{title}: {model.fast}"), *shown, *rest]


def _rule(model: EndToEnd) -> Lines:
    """The rule in formulas, at each end of a chunk."""
    if model.update is None:
        return []
    rule = model.update.rule
    update = "S" if rule.momentum is not None else "g"
    if rule.nesterov:
        update = f"(g + {_rate(rule.momentum, 'mu')} S)"
    for stage in rule.at_end:
        update = f"{stage.label}({update})" if stage.on == "update" else update
    kept = "W" if rule.decay is None else f"{_rate(rule.decay, 'alpha')} W"
    lines = [("every chunk", f"g = d/dW of the mean next-token loss of its {model.chunk} tokens, at the W they read")]
    if rule.momentum is not None:
        mu = _rate(rule.momentum, "mu")
        lines.append(("", f"S <- {mu} S + {f'(1 - {mu}) g' if rule.ema else 'g'}"))
    lines.append(("", f"W <- {kept} - rate * {_rate(rule.lr, 'lr')} * {update}"))
    return lines + [("", f"then {s.label} of the weights") for s in rule.at_end if s.on != "update"]


def _rate(rate: Any, name: str) -> str:
    """A number as it is; what is learned, or differs from weight to weight, by the name of its role."""
    return name if isinstance(rate, ParamSpec | Mapping) else f"{rate:g}"


def _costs(model: EndToEnd, tokens: int) -> Lines:
    """Of a training step per token, in products; beside it the same network without learning."""
    forward, backward = _counted(model, tokens)
    said = [f"{_count(n / tokens)}FLOP" for n in (forward, backward)]
    lines = [("a training step", f"per token {said[0]} forward and {said[1]} backward (T = {tokens}, products alone)")]
    if model.update is None:
        return lines
    plain = sum(_without_learning(model, lambda: _counted(model, tokens)))
    ratio = (forward + backward) / max(plain, 1)
    return [*lines, ("", f"{ratio:.2f} times what it takes without learning, {_count(plain / tokens)}FLOP")]


def _counted(model: EndToEnd, tokens: int) -> tuple[int, int]:
    """The operations of a forward and a backward of one sequence."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    with FakeTensorMode(allow_non_fake_inputs=True), Flops() as counted:
        loss = model(_tokens(model, tokens + 1)).loss
        forward = counted.total
        torch.autograd.grad(loss, parameters, allow_unused=True)
    return forward, counted.total - forward


def _without_learning(model: EndToEnd, what: Callable[[], Any]) -> Any:
    update, model.update = model.update, None
    try:
        return what()
    finally:
        model.update = update


def _memory(model: EndToEnd, tokens: int) -> Lines:
    """What the sweep keeps of a sequence, and what decoding carries."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        state = model.prefill(_tokens(model, tokens))
    fast, caches = (_bytes(x) for x in (vars(state.fast), state.suffix_caches))
    count = -(-tokens // model.chunk)
    lines = []
    if model.update is not None and model.backward == "sweep":
        kept = -(-count // model.keep)
        said = f"{_bytes_text(fast)} of fast weights and {_bytes_text(caches)} of caches"
        lines += [
            (
                "a backward keeps",
                f"{said} per sequence at {kept} of {count} chunks: {_bytes_text(kept * (fast + caches))}",
            )
        ]
        lines += [("", f"and records one chunk at a time, keep={model.keep}")]
    elif model.update is not None:
        lines += [("a backward keeps", "everything of every chunk, as autograd recorded it")]
    return [*lines, ("decoding carries", f"{_bytes_text(state.bytes)} per sequence, at any length")]


def _tokens(model: EndToEnd, count: int) -> Tensor:
    return torch.zeros(1, count, dtype=torch.long, device=next(model.parameters()).device)


def _bytes(tree: Any) -> int:
    return sum(x.numel() * x.element_size() for x in tree_flatten(tree)[0] if isinstance(x, Tensor))


def _count(n: float) -> str:
    for size, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if n >= size:
            return f"{n / size:.3g}{unit}"
    return f"{n:.3g} "


def _bytes_text(n: float) -> str:
    return f"{_count(n)}B"
