r"""Programs as LaTeX: the lines of the printed program as a reader of a paper writes them.

    x1: f32[C, F] = k[c] @ W1 + b1    ->    x_{1} &= k_{c} W_{1} + \mathbf{1} b_{1}

One convention makes named axes into matrices: tokens are rows. A vector over features is a row, a vector over
tokens a column, and a 1 in bold is the column of ones. What NumPy broadcasts is then a product: `x * gamma` is
x diag(gamma), `x - m[:, None]` is x - m 1^T. Values with three axes or more, which matrices cannot show, are
written as sums over indices.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

import sympy

from tttc.ir.contraction import layout
from tttc.ir.expr import OPS, Axes, Axis, Expr, leaves
from tttc.ir.names import spelled
from tttc.ir.ops import TOKEN_AXES, is_upper
from tttc.ir.program import SEQUENCE, Allocate, Block, For, Function, Program, Restore, Save, Statement, blocks, values
from tttc.ir.program_text import formulas, said
from tttc.ir.scalars import SCALARS, Formula
from tttc.ir.text import Namer, Text, core, steps

ONES = r"\mathbf{1}"
TRANSPOSED = r"^{\top}"
SUM, HADAMARD, PRODUCT, POWER, ATOM = range(1, 6)
"""Precedences of `Text`: a matrix product binds closer than an elementwise one."""

Shape = tuple[Axis | None, Axis | None]
"""The rows and the columns of a matrix; None where there is one."""

_GREEK = frozenset(
    ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu", "nu")
) | frozenset(("xi", "pi", "rho", "sigma", "tau", "upsilon", "phi", "chi", "psi", "omega"))
_CAPITALS = frozenset(("Gamma", "Delta", "Theta", "Lambda", "Xi", "Pi", "Sigma", "Upsilon", "Phi", "Psi", "Omega"))
_FUNCTIONS = {
    "exp": r"\exp\left({}\right)",
    "log": r"\log\left({}\right)",
    "sin": r"\sin\left({}\right)",
    "cos": r"\cos\left({}\right)",
    "tanh": r"\tanh\left({}\right)",
    "sqrt": r"\sqrt{{{}}}",
    "rsqrt": r"\frac{{1}}{{\sqrt{{{}}}}}",
    "abs": r"\left|{}\right|",
    "sigmoid": r"\sigma\left({}\right)",
    "less_equal": r"\left[{} \le {}\right]",
}


# -- names ---------------------------------------------------------------------------------------------------


def name_latex(name: str, at: str | None = None) -> str:
    r"""W1 -> W_{1}, S_W1 -> S_{W_{1}}, tau at t -> \tau_{t}, lr -> \mathrm{lr}, dW1 -> \mathrm{d}W_{1}."""
    stem, _, below = spelled(name).partition("_")
    letters, digits = re.fullmatch(r"(.*?)(\d*)", stem).groups()  # type: ignore[union-attr]
    subscripts = [digits] if digits else []
    subscripts += [name_latex(below)] if below else []
    subscripts += [at] if at else []
    lowered = f"_{{{','.join(subscripts)}}}" if subscripts else ""
    if letters[:1] == "d" and len(letters) > 1 and (len(letters) == 2 or letters[1:] in _GREEK):
        return rf"\mathrm{{d}}{_letters(letters[1:])}{lowered}"
    return _letters(letters) + lowered


def _letters(text: str) -> str:
    if text in _GREEK or text in _CAPITALS:
        return "\\" + text
    return text if len(text) == 1 else rf"\mathrm{{{text}}}"


def function_name_latex(name: str) -> str:
    r"""gelu -> \operatorname{gelu}, ddgelu -> \operatorname{gelu}'', layer_norm -> \operatorname{LayerNorm}."""
    base = name
    while base not in SCALARS and base.startswith("d") and len(base) > 1:
        base = base[1:]
    if base in SCALARS:
        return rf"\operatorname{{{_escaped(base)}}}" + "'" * (len(name) - len(base))
    if OPS.get(name) is not None and OPS[name].lower:
        return rf"\operatorname{{{''.join(part.capitalize() for part in name.split('_'))}}}"
    return rf"\operatorname{{{_escaped(name)}}}"


def _escaped(name: str) -> str:
    return name.replace("_", r"\_")


# -- expressions ---------------------------------------------------------------------------------------------


def natural(axes: Axes) -> Shape:
    """The shape of a value: two axes are rows and columns; one is a column of tokens or a row of features."""
    if len(axes) == 2:
        return axes[0], axes[1]
    if len(axes) == 1:
        return (axes[0], None) if axes[0].name in TOKEN_AXES else (None, axes[0])
    return None, None


@dataclass
class LatexPrinter:
    """Prints expressions of up to two axes as matrices; values in `names` are not spelled out."""

    names: dict[Expr, str] = field(default_factory=dict)

    def __call__(self, e: Expr) -> str:
        return self.matrix(e, natural(e.axes)).text

    def matrix(self, e: Expr, shape: Shape) -> Text:
        """`e` with these rows and columns: written so, or transposed."""
        own = natural(e.axes)
        if e not in self.names and len(e.axes) <= 2:
            if e.op == "rename":
                back: dict[Axis | None, Axis | None] = {new: old for old, new in e.arg}
                return self.matrix(e.src[0], (back.get(shape[0], shape[0]), back.get(shape[1], shape[1])))
            if e.op == "contract":
                return self._contract(e, shape)
            if e.op in ("add", "sub", "mul", "neg") and shape == own:
                return getattr(self, f"_{e.op}")(e, shape)
        text = self._own(e)
        if shape == own or own == (None, None):
            return text
        return Text(_atom(text) + TRANSPOSED, POWER)

    def _own(self, e: Expr) -> Text:
        """`e` in its natural shape, by its name or by its operation."""
        if e in self.names:
            return Text(self.names[e], ATOM)
        if e.op not in ("leaf", "rename") and any(len(x.axes) > 2 for x in (e, *e.src)):
            return self._indexed(e)
        if e.op in ("add", "sub", "mul", "neg", "div", "contract"):
            return getattr(self, f"_{e.op}")(e, natural(e.axes))
        if e.op in SCALARS:
            return self._function(e)
        if e.op == "rename":
            return self._own(e.src[0])
        return getattr(self, f"_{e.op}", self._composite)(e)

    def spread(self, e: Expr, shape: Shape) -> Text:
        """`e` broadcast to the shape: a column times a row of ones, or a column of ones times a row."""
        own = natural(e.axes)
        if own in ((None, None), shape) or len(e.axes) == 2:
            return self.matrix(e, shape)
        if e.axes[0] == shape[0]:
            column = self.matrix(e, (e.axes[0], None))
            return column if shape[1] is None else Text(f"{_factor(column)} {ONES}{TRANSPOSED}", PRODUCT)
        row = self.matrix(e, (None, e.axes[0]))
        return row if shape[0] is None else Text(f"{ONES} {_factor(row)}", PRODUCT)

    # -- leaves

    def _leaf(self, e: Expr) -> Text:
        leaf = e.variable
        return Text(name_latex(leaf.name, leaf.at), ATOM)

    def _const(self, e: Expr) -> Text:
        if not math.isfinite(e.arg):
            infinite = r"-\infty" if e.arg < 0 else r"\infty"
            return Text(infinite if e.arg == e.arg else r"\mathrm{NaN}", SUM if e.arg < 0 else ATOM)
        value = sympy.Integer(int(e.arg)) if e.arg == int(e.arg) else sympy.Float(repr(e.arg))
        return Text(sympy.latex(value).replace(r"1.0 \cdot ", ""), SUM if e.arg < 0 else ATOM)

    def _size(self, e: Expr) -> Text:
        return Text(spelled(e.arg.size), ATOM)

    # -- elementwise

    def _add(self, e: Expr, shape: Shape) -> Text:
        left, right = (self.spread(s, shape) for s in e.src)
        return Text(f"{left.text} + {right.text}", SUM)

    def _sub(self, e: Expr, shape: Shape) -> Text:
        left, right = (self.spread(s, shape) for s in e.src)
        return Text(f"{left.text} - {_wrapped(right, HADAMARD)}", SUM)

    def _neg(self, e: Expr, shape: Shape) -> Text:
        return Text(f"-{_wrapped(self.matrix(e.src[0], shape), HADAMARD)}", SUM)

    def _mul(self, e: Expr, shape: Shape) -> Text:
        return self._times(e.src, shape)

    def _times(self, operands: Iterable[Expr], shape: Shape) -> Text:
        """An elementwise product: numbers first, columns and rows that scale a matrix as diagonals beside it."""
        numbers, before, whole, after = [], [], [], []
        for s in operands:
            if not s.axes:
                numbers.append(_factor(self.matrix(s, (None, None))))
            elif len(s.axes) == 2 or None in shape:
                whole.append(self.matrix(s, shape))
            elif s.axes[0] == shape[0]:
                before.append(rf"\operatorname{{diag}}\left({self(s)}\right)")
            else:
                after.append(rf"\operatorname{{diag}}\left({self(s)}\right)")
        inside = (
            Text(r" \odot ".join(_wrapped(w, HADAMARD) for w in whole), HADAMARD)
            if len(whole) > 1
            else whole[0]
            if whole
            else None
        )
        if inside is None:
            inside = Text(ONES + ONES + TRANSPOSED, PRODUCT) if before or after else Text("", ATOM)
        if not (numbers or before or after):
            return inside
        scaled = _factor(inside) if before or after or inside.precedence < HADAMARD else inside.text
        parts = [*([r" \cdot ".join(numbers)] if numbers else []), *before, scaled, *after]
        precedence = HADAMARD if len(whole) > 1 and not (before or after) else PRODUCT
        return Text(r" \, ".join(part for part in parts if part), precedence)

    def _div(self, e: Expr, shape: Shape) -> Text:
        above, below = (self.spread(s, shape) for s in e.src)
        return Text(rf"\frac{{{above.text}}}{{{below.text}}}", ATOM)

    def _pow(self, e: Expr) -> Text:
        exponent = sympy.latex(sympy.nsimplify(e.arg))
        base = _atom(self.matrix(e.src[0], natural(e.axes)))
        return Text(f"{base}^{{{exponent}}}" if not e.axes else rf"{base}^{{\odot {exponent}}}", POWER)

    def _function(self, e: Expr) -> Text:
        operands = [self.spread(s, natural(e.axes)).text for s in e.src]
        if e.op in _FUNCTIONS:
            return Text(_FUNCTIONS[e.op].format(*operands), ATOM)
        return _call(function_name_latex(e.op), operands)

    def _map(self, e: Expr) -> Text:
        return _call(function_name_latex(e.arg.name), [self.spread(s, natural(e.axes)).text for s in e.src])

    # -- contractions and reductions

    def _contract(self, e: Expr, shape: Shape) -> Text:
        if any(len(s.axes) > 2 for s in e.src):
            return self._indexed(e)
        kind = layout(e).kind
        if kind == "product":
            return self._times(e.src, shape)
        if kind == "outer":
            left, right = e.src if e.src[0].axes[0] == shape[0] else e.src[::-1]
            return _product(self.matrix(left, (left.axes[0], None)), self.matrix(right, (None, right.axes[0])))
        if kind == "matmul":
            return self._matmul(e, shape)
        if kind == "dot":
            return self._total(self._times(e.src, natural(e.src[0].axes)), e.src[0].axes, e.arg, shape)
        return self._indexed(e)

    def _matmul(self, e: Expr, shape: Shape) -> Text:
        """L R with the summed axis as the columns of L and the rows of R, in the order that gives the shape."""
        (axis,) = e.arg
        left, right = e.src
        rest = [next((a for a in s.axes if a != axis), None) for s in (left, right)]
        if (rest[0], rest[1]) != shape:
            left, right, rest = right, left, rest[::-1]
        return _product(self.matrix(left, (rest[0], axis)), self.matrix(right, (axis, rest[1])))

    def _total(self, inside: Text, axes: Axes, over: Axes, shape: Shape) -> Text:
        """Sums as products with ones: X 1 over columns, 1^T X over rows."""
        rows, columns = natural(axes)
        text = _factor(inside)
        text = f"{ONES}{TRANSPOSED} {text}" if rows in over else text
        text = f"{text} {ONES}" if columns in over else text
        kept = (None if rows in over else rows, None if columns in over else columns)
        return (
            Text(text, PRODUCT)
            if kept == shape or kept == (None, None)
            else Text(rf"\left({text}\right){TRANSPOSED}", POWER)
        )

    def _sum(self, e: Expr) -> Text:
        (x,) = e.src
        if x.op == "pow" and x.arg == 2 and x not in self.names and not e.axes:
            return Text(rf"\left\lVert {self(x.src[0])} \right\rVert^{{2}}", POWER)
        return self._total(self.matrix(x, natural(x.axes)), x.axes, e.arg, natural(e.axes))

    def _over(self, e: Expr, name: str) -> Text:
        (x,) = e.src
        text = rf"{name}_{{{','.join(spelled(a.size) for a in e.arg)}}}\left({self(x)}\right)"
        rows, columns = natural(x.axes)
        kept = (None if rows in e.arg else rows, None if columns in e.arg else columns)
        return Text(text, ATOM) if kept == natural(e.axes) else Text(text + TRANSPOSED, POWER)

    def _mean(self, e: Expr) -> Text:
        return self._over(e, r"\operatorname{mean}")

    def _max(self, e: Expr) -> Text:
        return self._over(e, r"\max")

    # -- tokens

    def _mask(self, e: Expr) -> Text:
        return _call(_token_operation(e), [self.spread(e.src[0], natural(e.axes)).text])

    def _broadcast(self, e: Expr) -> Text:
        return self.spread(e.src[0], natural(e.axes))

    def _last(self, e: Expr) -> Text:
        return _call(_token_operation(e), [self(e.src[0])])

    _put_last = _stop_gradient = _last

    def _along_tokens(self, e: Expr) -> Text:
        """An operation along the tokens of an axis: those are the rows of its operand."""
        axis = e.axis
        rest = next((a for a in e.src[0].axes if a != axis), None)
        return _call(_token_operation(e), [self.matrix(e.src[0], (axis, rest)).text])

    _segprod = _cumprod = _shift = _shift_back = _along_tokens

    def _solve(self, e: Expr) -> Text:
        known, unknown = e.arg
        matrix, right = e.src
        rest = next((a for a in e.axes if a != unknown), None)
        return _product(_inverse(e, self.matrix(matrix, (known, unknown))), self.matrix(right, (known, rest)))

    def _composite(self, e: Expr) -> Text:
        settings = e.arg[1:] if isinstance(e.arg, tuple) else ()
        operands = [self(s) for s in e.src]
        shown = [", ".join(operands[1:])] if operands[1:] else []
        shown += [rf"\varepsilon = {self._const(Expr('const', (), value)).text}" for value in settings]
        return _call(function_name_latex(e.op), [";\\, ".join([operands[0], *shown])])

    # -- three axes and more

    def _indexed(self, e: Expr) -> Text:
        """By indices: the operands with their axes as subscripts, the summed axes below a sum."""
        operands = [self._inside(s).text for s in e.src]
        if e.op in ("contract", "sum"):
            total = rf"\textstyle\sum_{{{','.join(spelled(a.name) for a in e.arg)}}} " if e.arg else ""
            return Text(total + r" \, ".join(operands), SUM)
        if e.op == "solve":
            return _product(_inverse(e, self._inside(e.src[0])), self._inside(e.src[1]))
        if e.op == "broadcast":
            return self._inside(e.src[0])
        if e.op == "neg":
            return Text(f"-{operands[0]}", SUM)
        signs = {"add": " + ", "sub": " - ", "mul": r" \, ", "div": " / "}
        if e.op in signs:
            return Text(signs[e.op].join(operands), SUM)
        return _call(_token_operation(e), operands)

    def _inside(self, e: Expr) -> Text:
        text = self._own(e)
        indices = "".join(spelled(a.name) for a in e.axes)
        return Text(rf"\left[{text.text}\right]_{{{indices}}}", ATOM) if indices else text


def _token_operation(e: Expr) -> str:
    """The name of an operation on tokens; of any other its own."""
    if e.op == "mask":
        rows, columns, strict = e.arg
        lower = e.axes.index(rows) < e.axes.index(columns)
        return (r"\operatorname{tril}" if lower else r"\operatorname{triu}") + (
            ("_{-1}" if lower else "_{1}") if strict else ""
        )
    if e.op == "shift":
        return rf"\operatorname{{shift}}_{{{e.arg[1]:g}}}"
    known = {"shift_back": r"\operatorname{shift}_{0}" + TRANSPOSED, "put_last": r"\operatorname{atlast}"}
    return (known | {"stop_gradient": r"\operatorname{sg}"}).get(e.op, function_name_latex(e.op))


def _inverse(solve: Expr, matrix: Text) -> Text:
    """Of a unit triangular system, of whose matrix only what lies beside the diagonal is read."""
    name = r"\operatorname{triu}_{1}" if is_upper(solve) else r"\operatorname{tril}_{-1}"
    return Text(rf"\left(I + {_call(name, [matrix.text]).text}\right)^{{-1}}", POWER)


def _call(name: str, operands: Iterable[str]) -> Text:
    return Text(rf"{name}\left({', '.join(operands)}\right)", ATOM)


def _product(left: Text, right: Text) -> Text:
    return Text(f"{_factor(left)} {_factor(right)}", PRODUCT)


def _factor(text: Text) -> str:
    return _wrapped(text, PRODUCT)


def _atom(text: Text) -> str:
    return _wrapped(text, ATOM)


def _wrapped(text: Text, precedence: int) -> str:
    return text.text if text.precedence >= precedence else rf"\left({text.text}\right)"


# -- programs ------------------------------------------------------------------------------------------------


def program_latex(program: Program) -> str:
    """Each block an `align*` with the lines of the printed program, each loop a line of text."""
    roots = [v for f in program.functions for block in blocks(f.body) for v in values(block)]
    parts = [_align([formula_latex(f) for f in formulas(roots)])] if formulas(roots) else []
    parts += [function_latex(f, program) for f in program.functions]
    return "\n\n".join(parts)


def formula_latex(formula: Formula) -> str:
    """The definition of a named elementwise function."""
    arguments = ", ".join(sympy.latex(s) for s in formula.symbols)
    body = formula.body.replace(lambda e: e.is_Float, lambda e: sympy.Float(e, 6))
    return rf"{function_name_latex(formula.name)}({arguments}) &= {sympy.latex(body)}"


def function_latex(function: Function, program: Program) -> str:
    """One function: its name and parameters as text, then its body."""
    head = rf"\paragraph{{\texttt{{{_escaped(function.name)}}}}} of {_listed(function.params)}:"
    namer = Namer(said(function, program), program.names)
    return "\n".join(
        [head, *_body(function.body, program, namer), rf"\par\noindent gives {_listed(function.returns)}."]
    )


def _listed(values: Iterable[Expr]) -> str:
    """Names in a line of text, which may break between them."""
    return ", ".join(f"${name_latex(e.name)}$" for e in values)


def _body(body: tuple[Statement, ...], program: Program, namer: Namer) -> list[str]:
    lines: list[str] = []
    for statement in body:
        if isinstance(statement, Block):
            lines += [_align(_block(statement, program, namer))] if statement.assigns else []
        elif isinstance(statement, For):
            lines += [
                _loop(statement),
                *_body(statement.body, program, namer),
                rf"\par\noindent (end of the loop over ${statement.var}$)",
            ]
        elif isinstance(statement, Save | Restore):
            verb, kept = ("keep", statement.values) if isinstance(statement, Save) else ("take back", statement.targets)
            lines.append(rf"\par\noindent {verb} {_listed(kept)}")
        else:
            assert isinstance(statement, Allocate)  # a sequence to be filled is no mathematics
    return lines


def _loop(loop: For) -> str:
    over = "the sequence" if loop.over is SEQUENCE else f"${loop.over}$"
    order = ", the last first" if loop.reverse else ""
    if loop.step is None:
        return rf"\par\noindent for each token ${loop.var}$ of {over}{order}:"
    if loop.step == loop.over:
        return rf"\par\noindent for ${loop.var}$, all tokens of {over}:"
    return rf"\par\noindent for each chunk ${loop.var}$ of ${loop.step}$ tokens of {over}{order}:"


def _block(block: Block, program: Program, namer: Namer) -> list[str]:
    r"""The lines of a block; \leftarrow where a variable takes a new value from its old one."""
    printer = LatexPrinter()
    targets = {a.leaf: a.target for a in block.assigns}
    read = {e.name for e in leaves(values(block)) if e.at is None}
    lines = []
    for step in steps(block, Namer(namer.taken, program.names)):
        axes = targets[step.target].axes if step.target else step.value.axes
        name = name_latex(step.name, step.target.at if step.target else None)
        relation = r"\leftarrow" if step.name in read else "="
        space = "" if step.target else rf" && {_space(axes)}"
        lines.append(f"{name} &{relation} {printer.matrix(step.value, natural(axes)).text}{space}")
        computed = core(step.value).op not in ("leaf", "const", "size", "broadcast")
        if step.target is None or (step.target.at is None and step.value.axes == axes and computed):
            printer.names[step.value] = name
    return lines


def _space(axes: Axes) -> str:
    sizes = r" \times ".join(spelled(a.size) for a in axes)
    return rf"\in \mathbb{{R}}^{{{sizes}}}" if axes else r"\in \mathbb{R}"


def _align(lines: list[str]) -> str:
    return "\\begin{align*}\n" + " \\\\\n".join(f"  {line}" for line in lines) + "\n\\end{align*}"
