"""Expressions as Triton: a value with axes (t, D) is a block with these dimensions, each a power of two.

    (A * (q[c] @ k[c].T + 1)) @ g   ->   dot(A * (dot(q, tl.trans(k), operand) + 1), g, operand)

Where an axis is longer in the block than in the program, `padding.py` says what has to be cut off before a sum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tttc.backends.triton.ops import ELEMENTWISE, power
from tttc.backends.triton.padding import Padding
from tttc.ir.contraction import layout
from tttc.ir.expr import Axes, Axis, Expr
from tttc.ir.ops import is_upper
from tttc.ir.scalars import SCALARS
from tttc.ir.text import Printer, Text

SMALLEST = 16  # of the three sizes of a product on tensor cores
TOKENS = "C"


def block_size(n: int) -> int:
    """The number of places that a block has for n."""
    return max(SMALLEST, 1 << (n - 1).bit_length()) if n > 1 else 1


class TritonPrinter(Printer):
    """Prints expressions as blocks. `indices` are the names of the places along each dim, `chunk` the tokens."""

    def __init__(self, dims: Mapping[str, int], chunk: int, indices: Mapping[str, str], padding: Padding) -> None:
        super().__init__()
        self.dims, self.chunk, self.indices, self.padding = dims, chunk, indices, padding

    # -- places

    def block(self, axis: Axis) -> int:
        return block_size(self.chunk if axis.size == TOKENS else self.dims[axis.size])

    def place(self, axis: Axis, axes: Sequence[Axis]) -> str:
        """The places along an axis, as they stand among others: t[:, None]."""
        name = self.indices[axis.size]
        if len(axes) == 1:
            return name
        return f"{name}[{', '.join(':' if a == axis else 'None' for a in axes)}]"

    def inside(self, axis: Axis, axes: Sequence[Axis]) -> str:
        """Whether these places are none beyond the end."""
        end = "length" if axis.size == TOKENS else str(self.dims[axis.size])
        return f"{self.place(axis, axes)} < {end}"

    def cut(self, text: Text, axes: Axes, unclean: Sequence[Axis]) -> Text:
        """The value with zeros beyond the ends of some axes."""
        if not unclean:
            return text
        conditions = [self.inside(a, axes) for a in unclean]
        shown = conditions[0] if len(conditions) == 1 else " & ".join(f"({c})" for c in conditions)
        return Text(f"tl.where({shown}, {text.text}, 0.0)")

    def clean(self, e: Expr, axes: Axes, over: Sequence[Axis]) -> Text:
        """`e` with its dimensions in the order `axes`, zero beyond the ends of the axes `over`."""
        return self.cut(self.ordered(e, axes), axes, self.padding.unclean(e, frozenset(over)))

    # -- layout

    def transposed(self, text: Text, axes: Axes, to: Axes) -> Text:
        if len(axes) == 2:
            return Text(f"tl.trans({text.text})")
        return Text(f"tl.permute({text.text}, ({', '.join(str(axes.index(a)) for a in to)}))")

    def aligned(self, e: Expr, to: Axes) -> Text:
        return self.spread(self.ordered(e, tuple(a for a in to if a in e.axes)), e.axes, to)

    def spread(self, text: Text, axes: Axes, to: Axes) -> Text:
        """A block ready to be broadcast: axes that it lacks have one place."""
        if not axes or len(axes) == len(to):
            return text
        return Text(f"{text.at_least(5)}[{', '.join(':' if a in axes else 'None' for a in to)}]")

    # -- operations

    def _leaf(self, e: Expr) -> Text:
        return Text(str(e.arg[0].name))

    def _size(self, e: Expr) -> Text:
        return Text("length" if e.arg.size == TOKENS else str(self.dims[e.arg.size]))

    def _elementwise(self, e: Expr, axes: Axes) -> Text:
        if SCALARS[e.op].infix is None:
            return Text(ELEMENTWISE[e.op].format(*(self.aligned(s, axes).text for s in e.src)))
        return super()._elementwise(e, axes)

    def _pow(self, e: Expr) -> Text:
        text = self.text(e.src[0])
        if e.arg == 2 and text.text.isidentifier():
            return Text(f"{text.text} * {text.text}", 2)
        return Text(power(text.text, float(e.arg)))

    def _contract(self, e: Expr) -> Text:
        kind, *_ = layout(e)
        if len(e.src) == 2 and len(e.arg) == 1 and (text := self._matmul(e)) is not None:
            return text
        if kind == "outer":
            left, right = (self.spread(self.text(s), s.axes, e.axes) for s in e.src)
            return Text(f"{left.at_least(2)} * {right.at_least(3)}", 2)
        return self._sum_of_products(e)

    def _matmul(self, e: Expr) -> Text | None:
        """Two matrices, perhaps one of each for every place of an axis that both have."""
        (over,) = e.arg
        left, right = e.src
        if over not in left.axes or over not in right.axes:
            return None
        shared = [a for a in left.axes if a in right.axes and a != over]
        rows, columns = ([a for a in s.axes if a not in (over, *shared)] for s in (left, right))
        if len(rows) != 1 or len(columns) != 1 or len(shared) > 1:
            return None
        if min(self.block(a) for a in (over, *rows, *columns)) < SMALLEST:
            return None
        x, y = self._factors(e, ((*shared, *rows, over), (*shared, over, *columns)))
        made = Text(f"dot({x.text}, {y.text}, operand)")
        axes = (*shared, *rows, *columns)
        return made if axes == e.axes else self.transposed(made, axes, e.axes)

    def _factors(self, e: Expr, orders: Sequence[Axes]) -> list[Text]:
        """The factors of a contraction in these orders: along what is summed over one of them is zero beyond its end,
        and the others are numbers there.
        """
        texts = []
        clean = {a for a in e.arg for s in e.src if a in self.padding.zero(s)}
        for s, axes in zip(e.src, orders, strict=True):
            mine = [a for a in e.arg if a in s.axes]
            needed = [a for a in mine if a not in clean or not self.padding.finite(s)]
            texts.append(self.clean(s, axes, needed))
            clean |= set(needed)
        return texts

    def _sum_of_products(self, e: Expr) -> Text:
        """Any contraction: the product of blocks that are spread out over all axes, summed over some."""
        axes = (*e.axes, *e.arg)
        orders = [tuple(a for a in axes if a in s.axes) for s in e.src]
        texts = [self.spread(x, o, axes) for x, o in zip(self._factors(e, orders), orders, strict=True)]
        product = " * ".join(x.at_least(3) for x in texts)
        for position in reversed(range(len(e.axes), len(axes))):
            product = f"tl.sum({product}, {position})"
        return Text(product, 5 if e.arg else 2)

    def _reduction(self, e: Expr) -> Text:
        x = e.src[0]
        if e.op == "max":
            unclean = [a for a in e.arg if self.padding.padded(a)]
            text = self.text(x).text
            for a in unclean:
                text = f'tl.where({self.inside(a, x.axes)}, {text}, float("-inf"))'
        else:
            text = self.clean(x, x.axes, e.arg).text
        for position in sorted((x.axes.index(a) for a in e.arg), reverse=True):
            text = f"tl.{'max' if e.op == 'max' else 'sum'}({text}, {position})"
        if e.op != "mean":
            return Text(text)
        sizes = " * ".join("length" if a.size == TOKENS else str(self.dims[a.size]) for a in e.arg)
        return Text(f"{text} / {f'({sizes})' if len(e.arg) > 1 else sizes}", 2)

    _sum = _mean = _max = _reduction

    def _mask(self, e: Expr) -> Text:
        rows, columns, strict = e.arg
        inside = self.aligned(e.src[0], e.axes).text
        compared = f"{self.place(rows, e.axes)} {'>' if strict else '>='} {self.place(columns, e.axes)}"
        return Text(f"tl.where({compared}, {inside}, 0.0)")

    def _broadcast(self, e: Expr) -> Text:
        shape = ", ".join(str(self.block(a)) for a in e.axes)
        value = e.src[0]
        if not value.axes and value.op in ("const", "size"):
            return Text(f"tl.full(({shape},), {self.text(value).text}, tl.float32)")
        return Text(f"tl.broadcast_to({self.aligned(value, e.axes).text}, ({shape},))" if e.axes else self.text(value).text)

    def _last(self, e: Expr) -> Text:
        x, axis = e.src[0], e.arg
        at = f"{self.place(axis, x.axes)} == length - 1"
        return Text(f"tl.sum(tl.where({at}, {self.text(x).text}, 0.0), {x.axes.index(axis)})")

    def _put_last(self, e: Expr) -> Text:
        at = f"{self.place(e.arg, e.axes)} == length - 1"
        return Text(f"tl.where({at}, {self.aligned(e.src[0], e.axes).text}, 0.0)")

    def _segprod(self, e: Expr) -> Text:
        rows, columns = e.arg
        t, s = self.place(rows, e.axes), self.place(columns, e.axes)
        factors = f"tl.where({t} > {s}, {self.aligned(e.src[0], e.axes).text}, 1.0)"
        return Text(f"tl.where({t} >= {s}, tl.cumprod({factors}, 0), 0.0)")

    def _cumprod(self, e: Expr) -> Text:
        return Text(f"tl.cumprod({self._token_first(e.src[0], e.arg)}, 0)")

    def _moved(self, e: Expr, axis: Axis, other: str, outside: str, fill: str) -> Text:
        """The rows of other tokens; `outside` is where there is none."""
        index = self.spread(Text(other), (axis,), e.axes).text
        shape = ", ".join(str(self.block(a)) for a in e.axes)
        rows = f"tl.broadcast_to({index}, ({shape},))" if len(e.axes) > 1 else index
        taken = f"tl.gather({self._token_first(e.src[0], axis)}, {rows}, 0)"
        return Text(f"tl.where({self.spread(Text(f'({outside})'), (axis,), e.axes).text}, {fill}, {taken})")

    def _shift(self, e: Expr) -> Text:
        axis, fill = e.arg
        t = self.indices[axis.size]
        return self._moved(e, axis, f"tl.maximum({t} - 1, 0)", f"{t} == 0", repr(float(fill)))

    def _shift_back(self, e: Expr) -> Text:
        t = self.indices[e.arg.size]
        return self._moved(e, e.arg, f"tl.minimum({t} + 1, {self.block(e.arg) - 1})", f"{t} >= length - 1", "0.0")

    def _solve(self, e: Expr) -> Text:
        known, unknown = e.arg
        lower, right = e.src
        columns = e.axes[1:]
        matrix = self.cut(self.ordered(lower, (known, unknown)), (known, unknown), self._risky(lower))
        x = self.clean(right, (known, *columns), (known,))
        C = self.block(unknown)
        if len(columns) != 1:
            count = 1
            for a in columns:
                count *= self.block(a)
            x = Text(f"tl.reshape({x.text}, ({C}, {count}))")
        found = f"solve_lower({matrix.text}, {x.text}, {self.indices[unknown.size]}, {is_upper(e)})"
        if len(columns) == 1:
            return Text(found)
        shape = ", ".join(str(self.block(a)) for a in e.axes)
        return Text(f"tl.reshape({found}, ({shape},))")

    def _risky(self, e: Expr) -> list[Axis]:
        """The padded axes beyond whose ends there may be no numbers."""
        return [] if self.padding.finite(e) else [a for a in e.axes if self.padding.padded(a)]
