"""Expressions as Triton: a value with axes (t, D) is a block [D, t], each of its dimensions a power of two.

    x = k[c] @ W + b   ->   x = dot(W, k, operand) + b[:, None]

Tokens come last, the longest dimension first: the weights are then the first factor of a product, and warps are spread
over its rows. With 16 tokens as rows every warp would hold all of them.

Where an axis is longer in the block than in the program, `padding.py` says what has to be cut off before a sum.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from math import prod

from tttc.backends.triton.kernel_spec import KernelSpec
from tttc.backends.triton.ops import ROWS, power
from tttc.backends.triton.padding import Padding
from tttc.ir.expr import TOKENS, Axes, Axis, Expr
from tttc.ir.names import marked, renamed, suffixed, unmarked
from tttc.ir.ops import is_upper
from tttc.ir.scalars import SCALARS
from tttc.ir.text import Printer, Text, core


def wide(name: str) -> str:
    """What a variable is called as float32."""
    return renamed(name, lambda n: suffixed(n, "f32"))


class TritonPrinter(Printer):
    """Prints expressions as blocks. `indices` are the names of the places along each dim, `loaded` the
    variables that come from memory and stay as they are."""

    infinity, undefined = 'float("inf")', 'float("nan")'

    def __init__(
        self,
        spec: KernelSpec,
        indices: Mapping[str, str],
        padding: Padding,
        loaded: Collection[str],
    ) -> None:
        super().__init__(word=marked)
        self.loaded = loaded
        self.spec, self.dims, self.indices, self.padding = spec, spec.program.dims, indices, padding
        self.called: dict[str, str] = {}
        """Variables that have another name here than in the program."""
        self.widened: set[str] = set()
        """Variables that are read as float32, beside being factors of products in the dtype that they have."""

    # -- places

    def block(self, axis: Axis) -> int:
        return self.spec.block(axis)

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

    def arranged(self, axes: Axes) -> Axes:
        """The dimensions of a block: the longest first, tokens last, and otherwise the reverse of the program's."""
        feature = sorted((a for a in reversed(axes) if a.size != TOKENS), key=lambda a: -self.block(a))
        return (*feature, *(a for a in reversed(axes) if a.size == TOKENS))

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

    def writer(self, op: str) -> Callable[[Expr], Text]:
        found: Callable[[Expr], Text] = getattr(self, ROWS[op])
        return found

    def _leaf(self, e: Expr) -> Text:
        """A variable as float32. What a kernel loads and does not change has the dtype of its tensor."""
        name = self.variable(e)
        if name not in self.loaded:
            return Text(name)
        self.widened.add(name)
        return Text(wide(name))

    def variable(self, e: Expr) -> str:
        """What a leaf is called in the kernel."""
        name = e.name
        return self.called.get(name) or marked(name)

    def _size(self, e: Expr) -> Text:
        return Text("length" if e.arg.size == TOKENS else str(self.dims[e.arg.size]))

    def _elementwise(self, e: Expr, axes: Axes) -> Text:
        if SCALARS[e.op].infix is None:
            return Text(ROWS[e.op].format(*(self.aligned(s, axes).text for s in e.src)))
        return super()._elementwise(e, axes)

    def _pow(self, e: Expr) -> Text:
        text = self.text(e.src[0])
        if e.arg == 2 and unmarked(text.text).isidentifier():
            return Text(f"{text.text} * {text.text}", 2)
        return Text(power(text.text, float(e.arg)))

    def _map(self, e: Expr) -> Text:
        return Text(f"{e.arg.name}({', '.join(self.aligned(s, self.arranged(e.axes)).text for s in e.src)})")

    def _contraction(self, e: Expr, axes: Axes) -> Text:
        """A product summed over some axes: on tensor cores where it is one of matrices that are large enough."""
        if (text := self._matmul(e, axes)) is not None:
            return text
        return self._sum_of_products(e, axes)

    def _matmul(self, e: Expr, axes: Axes) -> Text | None:
        """Two matrices, perhaps one of each for every place of an axis that both have."""
        found = self.spec.factors(e)
        if found is None:
            return None
        (over,), (shared, own) = e.arg, found
        rows, columns = (a for a in axes if a not in shared)
        order = (*shared, rows, columns)
        first = own[0] == rows
        orders = [(*shared, over, columns), (*shared, rows, over)]
        texts = self._factors(e, orders[::-1] if first else orders, as_it_is=True)
        left, right = texts if first else texts[::-1]
        made = Text(f"dot({left.text}, {right.text}, operand)")
        return made if order == axes else self.transposed(made, order, axes)

    def _factors(self, e: Expr, orders: Sequence[Axes], *, as_it_is: bool = False) -> list[Text]:
        """The factors of a contraction in these orders: along what is summed over one of them is zero beyond its end,
        and the others are numbers there. `as_it_is`: in the dtype in which they were loaded.
        """
        texts = []
        clean = {a for a in e.arg for s in e.src if a in self.padding.zero(s)}
        for s, axes in zip(e.src, orders, strict=True):
            mine = [a for a in e.arg if a in s.axes]
            needed = [a for a in mine if a not in clean or not self.padding.finite(s)]
            x = core(s)
            if as_it_is and x.op == "leaf" and x not in self.names and not self.padding.unclean(s, frozenset(needed)):
                text = Text(self.variable(x))
                texts.append(
                    text if self.arranged(s.axes) == axes else self.transposed(text, self.arranged(s.axes), axes)
                )
            else:
                texts.append(self.clean(s, axes, needed))
            clean |= set(needed)
        return texts

    def _sum_of_products(self, e: Expr, to: Axes) -> Text:
        """Any contraction: the product of blocks that are spread out over all axes, summed over some. The largest one
        stays as it lies.
        """
        everything = {*e.axes, *e.arg}
        largest = max(e.src, key=lambda s: len(s.axes))
        axes = self.arranged(largest.axes) if set(largest.axes) == everything else (*to, *e.arg)
        orders = [tuple(a for a in axes if a in s.axes) for s in e.src]
        texts = [self.spread(x, o, axes) for x, o in zip(self._factors(e, orders), orders, strict=True)]
        product = " * ".join(x.at_least(3) for x in texts)
        for position in sorted((axes.index(a) for a in e.arg), reverse=True):
            product = f"tl.sum({product}, {position})"
        kept = tuple(a for a in axes if a not in e.arg)
        made = Text(product, 5 if e.arg else 2)
        return made if kept == to else self.transposed(made, kept, to)

    def _reduction(self, e: Expr) -> Text:
        x = e.src[0]
        axes = self.arranged(x.axes)
        if e.op == "max":
            text = self.text(x).text
            for a in (a for a in e.arg if self.padding.padded(a)):
                text = f'tl.where({self.inside(a, axes)}, {text}, float("-inf"))'
        else:
            text = self.clean(x, axes, e.arg).text
        for position in sorted((axes.index(a) for a in e.arg), reverse=True):
            text = f"tl.{'max' if e.op == 'max' else 'sum'}({text}, {position})"
        if e.op != "mean":
            return Text(text)
        sizes = " * ".join("length" if a.size == TOKENS else str(self.dims[a.size]) for a in e.arg)
        return Text(f"{text} / {f'({sizes})' if len(e.arg) > 1 else sizes}", 2)

    def _mask(self, e: Expr) -> Text:
        rows, columns, strict = e.arg
        axes = self.arranged(e.axes)
        inside = self.aligned(e.src[0], axes).text
        compared = f"{self.place(rows, axes)} {'>' if strict else '>='} {self.place(columns, axes)}"
        return Text(f"tl.where({compared}, {inside}, 0.0)")

    def shape(self, e: Expr) -> str:
        return f"({', '.join(str(self.block(a)) for a in self.arranged(e.axes))}{',' * (len(e.axes) == 1)})"

    def _broadcast(self, e: Expr) -> Text:
        value = e.src[0]
        if not e.axes:
            return self.text(value)
        if not value.axes and value.op in ("const", "size"):
            return Text(f"tl.full({self.shape(e)}, {self.text(value).text}, tl.float32)")
        return Text(f"tl.broadcast_to({self.aligned(value, self.arranged(e.axes)).text}, {self.shape(e)})")

    def _last(self, e: Expr) -> Text:
        x, axis = e.src[0], e.arg
        axes = self.arranged(x.axes)
        at = f"{self.place(axis, axes)} == length - 1"
        return Text(f"tl.sum(tl.where({at}, {self.text(x).text}, 0.0), {axes.index(axis)})")

    def _put_last(self, e: Expr) -> Text:
        axes = self.arranged(e.axes)
        return Text(f"tl.where({self.place(e.arg, axes)} == length - 1, {self.aligned(e.src[0], axes).text}, 0.0)")

    def _segprod(self, e: Expr) -> Text:
        rows, columns = e.arg
        axes = self.arranged(e.axes)
        t, s = self.place(rows, axes), self.place(columns, axes)
        factors = f"tl.where({t} > {s}, {self.aligned(e.src[0], axes).text}, 1.0)"
        return Text(f"tl.where({t} >= {s}, tl.cumprod({factors}, {len(axes) - 1}), 0.0)")

    def _tokens_last(self, e: Expr, axis: Axis) -> str:
        return self.ordered(e, (*(a for a in self.arranged(e.axes) if a != axis), axis)).text

    def _cumprod(self, e: Expr) -> Text:
        return Text(f"tl.cumprod({self._tokens_last(e.src[0], e.arg)}, {len(e.axes) - 1})")

    def _moved(self, e: Expr, axis: Axis, other: str, outside: str, fill: str) -> Text:
        """The columns of other tokens; `outside` is where there is none."""
        axes = self.arranged(e.axes)
        index = self.spread(Text(other), (axis,), axes).text
        columns = f"tl.broadcast_to({index}, {self.shape(e)})" if len(axes) > 1 else index
        taken = f"tl.gather({self._tokens_last(e.src[0], axis)}, {columns}, {len(axes) - 1})"
        return Text(f"tl.where({self.spread(Text(f'({outside})'), (axis,), axes).text}, {fill}, {taken})")

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
        columns = self.arranged(e.axes)[:-1]
        matrix = self.cut(self.ordered(lower, (unknown, known)), (unknown, known), self._risky(lower))
        x = self.clean(right, (*columns, known), (known,))
        if len(columns) != 1:
            x = Text(f"tl.reshape({x.text}, ({prod(self.block(a) for a in columns)}, {self.block(unknown)}))")
        found = f"solve_lower({matrix.text}, {x.text}, {self.indices[unknown.size]}, operand, {is_upper(e)})"
        return Text(found if len(columns) == 1 else f"tl.reshape({found}, {self.shape(e)})")

    def _risky(self, e: Expr) -> list[Axis]:
        """The padded axes beyond whose ends there may be no numbers."""
        return [] if self.padding.finite(e) else [a for a in e.axes if self.padding.padded(a)]
