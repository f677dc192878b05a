"""Expressions as PyTorch, on tensors with a leading axis G = batch * heads."""

from __future__ import annotations

from collections.abc import Callable

from tttc.backends.torch.ops import FUSED_DERIVATIVES, ROWS
from tttc.ir.contraction import layout
from tttc.ir.expr import OPS, TOKENS, Axes, Expr, postorder
from tttc.ir.names import marked, own
from tttc.ir.ops import einsum_spec
from tttc.ir.scalars import SCALARS
from tttc.ir.text import Printer, Text, core

CHUNK, HEADS = marked(own("C")), marked(own("G"))  # the tokens of a chunk; batch elements times heads


class TorchPrinter(Printer):
    """Prints expressions as PyTorch on tensors with a leading axis G."""

    infinity, undefined = "torch.inf", "torch.nan"

    def __init__(self, dims: dict[str, int], like: str) -> None:
        super().__init__(lengths={**{d: str(n) for d, n in dims.items()}, TOKENS: CHUNK}, word=marked)
        self.like = like

    def writer(self, op: str) -> Callable[[Expr], Text]:
        found: Callable[[Expr], Text] = getattr(self, ROWS[op])
        return found

    def transposed(self, text: Text, axes: Axes, to: Axes) -> Text:
        if len(axes) == 2:
            return Text(f"{text.at_least(5)}.mT")
        return Text(f"{text.at_least(5)}.permute(0, {', '.join(str(axes.index(a) + 1) for a in to)})")

    def aligned(self, e: Expr, to: Axes) -> Text:
        """A tensor ready to broadcast: missing axes are inserted, since G comes first."""
        if e.op in ("const", "size"):
            return self.text(e)
        present = tuple(a for a in to if a in e.axes)
        missing = [i for i, a in enumerate(to) if a not in e.axes]
        if not missing or not is_tensor(e):
            return self.ordered(e, present)
        kept = self._kept_dimension(e, to)
        if kept is not None:
            return kept
        text = self.ordered(e, present).at_least(5)
        if len(missing) == 1:
            i = missing[0]
            return Text(f"{text}.unsqueeze({-1 if i == len(to) - 1 else i + 1})")
        index = [":", *(":" if a in present else "None" for a in to)]
        while index[-1] == ":":
            index.pop()
        return Text(f"{text}[{', '.join(index)}]")

    def _kept_dimension(self, e: Expr, to: Axes) -> Text | None:
        """mean(x)[:, None] as one operation that keeps the dimension."""
        if e in self.names or e.op not in ("sum", "mean") or len(e.arg) != 1:
            return None
        (x,), (axis,) = e.src, e.arg
        if (*x.axes[:-1], axis) != x.axes or len(to) != len(x.axes) or to[:-1] != x.axes[:-1]:
            return None
        return Text(f"{self.text(x).at_least(5)}.{e.op}(-1, keepdim=True)")

    def _leaf(self, e: Expr) -> Text:
        return Text(name_of(e))

    def _elementwise(self, e: Expr, axes: Axes) -> Text:
        if e.op == "mul" and (fused := self._fused(e, axes)) is not None:
            return fused
        if SCALARS[e.op].infix is None:
            return Text(ROWS[e.op].format(*self._arguments(e, axes)))
        return super()._elementwise(e, axes)

    def _arguments(self, e: Expr, axes: Axes) -> list[str]:
        """The operands of a function of PyTorch, which takes no numbers alone; what a formula does with one is such a
        function too.
        """
        texts = [(is_tensor(s), self.aligned(s, axes).text) for s in e.src]
        wrapped = e.op == "map" or not any(is_tensor for is_tensor, _ in texts)
        return [f"{self.like}.new_full((), {x})" if wrapped and not is_tensor else x for is_tensor, x in texts]

    def _fused(self, e: Expr, axes: Axes) -> Text | None:
        for f, g in (e.src, e.src[::-1]):
            if f.op == "map" and f not in self.names and f.arg.name in FUSED_DERIVATIVES and set(g.axes) == set(f.axes):
                (x,) = f.src
                return Text(
                    FUSED_DERIVATIVES[f.arg.name].format(g=self.aligned(g, axes).text, x=self.aligned(x, axes).text)
                )
        return None

    def _map(self, e: Expr) -> Text:
        if e.arg.name in FUSED_DERIVATIVES:
            (x,) = self._arguments(e, e.axes)
            return Text(FUSED_DERIVATIVES[e.arg.name].format(g=f"torch.ones_like({x})", x=x))
        return Text(f"{e.arg.name}({', '.join(self._arguments(e, e.axes))})")

    def _contract(self, e: Expr) -> Text:
        kind, transpose_left, transpose_right = layout(e)
        if kind == "matmul":
            return self._matmul(e, transpose_left, transpose_right)
        if kind == "outer":
            a, c = (self.text(s).at_least(5) for s in e.src)
            return Text(f"{a}.unsqueeze(-1) * {c}.unsqueeze(1)", 2)
        if kind == "dot":
            left, right = e.src
            dims = [i - len(left.axes) for i, a in enumerate(left.axes) if a in e.arg]
            product = f"({self.text(left).at_least(2)} * {self.ordered(right, left.axes).at_least(3)})"
            kept = tuple(a for a in left.axes if a not in e.arg)
            result = Text(f"{product}.sum({dims[0] if len(dims) == 1 else tuple(dims)})")
            return result if kept == e.axes else self.transposed(result, kept, e.axes)
        return Text(f'torch.einsum("{einsum_spec(e, "...")}", {", ".join(self.text(s).text for s in e.src)})')

    def _matmul(self, e: Expr, transpose_left: bool, transpose_right: bool) -> Text:
        left, right = e.src
        a, c = self.text(left), self.text(right)
        if len(left.axes) == 1 and len(right.axes) == 1:
            return Text(f"({a.at_least(2)} * {c.at_least(3)}).sum(-1)")
        a_text = f"{a.at_least(5)}.mT" if transpose_left else a.at_least(2 if core(left).op == "contract" else 3)
        c_text = f"{c.at_least(5)}.mT" if transpose_right else c.at_least(3)
        if len(left.axes) == 1:
            return Text(f"({a.at_least(5)}.unsqueeze(1) @ {c_text}).squeeze(1)")
        if len(right.axes) == 1:
            return Text(f"({a_text} @ {c.at_least(5)}.unsqueeze(-1)).squeeze(-1)")
        return Text(f"{a_text} @ {c_text}", 2)

    def _reduction(self, e: Expr) -> Text:
        axes = e.src[0].axes
        dims = [axes.index(a) - len(axes) for a in e.arg]
        name = "amax" if e.op == "max" else e.op
        return Text(f"{self.text(e.src[0]).at_least(5)}.{name}({dims[0] if len(dims) == 1 else tuple(dims)})")

    def _mask(self, e: Expr) -> Text:
        rows, columns, strict = e.arg
        inside = self.text(e.src[0]).text
        if e.axes[-2:] == (rows, columns):
            return Text(f"torch.tril({inside}{', -1' if strict else ''})")
        if e.axes[-2:] == (columns, rows):
            return Text(f"torch.triu({inside}{', 1' if strict else ''})")
        allowed = f"torch.tril({self.like}.new_ones(({CHUNK}, {CHUNK})){', -1' if strict else ''})"
        turned = f"{allowed}.mT" if e.axes.index(columns) < e.axes.index(rows) else allowed
        index = [":" if a in (rows, columns) else "None" for a in e.axes]
        return Text(f"({inside}) * {turned}[{', '.join(index)}]", 2)

    def _broadcast(self, e: Expr) -> Text:
        shape = ", ".join([HEADS, *(self.size(a.size) for a in e.axes)])
        value = e.src[0]
        if not is_tensor(value):
            return Text(f"{self.like}.new_full(({shape}), {self.text(value).text})")
        return Text(f"{self.aligned(value, e.axes).at_least(5)}.expand({shape})")

    def _last(self, e: Expr) -> Text:
        position = e.src[0].axes.index(e.arg) + 1
        return Text(f"{self.text(e.src[0]).at_least(5)}.select({position}, -1)")

    def _put_last(self, e: Expr) -> Text:
        after = "0, 0, " * len(e.src[0].axes)
        return Text(f"F.pad({self.text(e.src[0]).at_least(5)}.unsqueeze(1), ({after}{CHUNK} - 1, 0))")

    def _cumprod(self, e: Expr) -> Text:
        return Text(f"torch.cumprod({self._token_first(e.src[0], e.arg)}, 1)")

    def _stop_gradient(self, e: Expr) -> Text:
        return Text(f"{self.text(e.src[0]).at_least(5)}.detach()")

    def _composite(self, e: Expr) -> Text:
        axis, *settings = e.arg if not hasattr(e.arg, "size") else (e.arg,)
        x = e.src[0]
        size = self.size(axis.size)
        text = self.ordered(x, e.axes).text
        if e.op == "softmax":
            return Text(f"torch.softmax({text}, {e.axes.index(axis) - len(e.axes)})")
        lower = OPS[e.op].lower
        if lower is not None and (e.axes[-1] != axis or e.op == "l2_norm"):
            return self.text(lower(e))
        call = "F.layer_norm" if e.op == "layer_norm" else "F.rms_norm"
        scaled = Text(f"{call}({text}, ({size},), eps={settings[0]:g})")
        scaled = Text(f"{scaled.text} * {self.aligned(e.src[1], e.axes).at_least(3)}", 2)
        return scaled if len(e.src) == 2 else Text(f"{scaled.text} + {self.aligned(e.src[2], e.axes).at_least(2)}", 1)


def is_tensor(e: Expr) -> bool:
    """Whether the value is a tensor rather than a Python number."""
    return bool(e.axes) or any(x.op == "leaf" or x.op == "broadcast" for x in postorder([e]))


def name_of(e: Expr) -> str:
    """What a leaf is called, in a text that is not yet whole."""
    return marked(e.name)
