"""What a chunk does to weights that are linear in gradients: coefficients instead of a weight matrix for each token.

    x_t = sum_j coefficient_j[t] * X_j + sum over s of kernel[t, s] * g_s

X_j is what the chunk found when it began. A recurrence x_t = alpha_t * x_{t-1} + y_t multiplies the response of y from
the left with P[t, s] = alpha_{s+1} * ... * alpha_t, so momentum under decay is P(alpha) @ P(mu) @ diag(lr).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tttc.ir import build as b
from tttc.ir.expr import Expr, const, is_const
from tttc.ir.program import S_AXIS, T_AXIS

R_AXIS = b.between(T_AXIS, S_AXIS)


@dataclass(frozen=True)
class InitialTerm:
    """sign * coefficient[t] * the product of `held`, values from before the chunk; a coefficient of None is 1.

    `before` is the coefficient that the token before the chunk would have.
    """

    sign: int
    held: tuple[Expr, ...]
    coefficient: Expr | None
    before: float


@dataclass(frozen=True)
class Transfer:
    """sign * row[t] * matrix[t, s] * column[s]; a row or column of None is 1.

    `kind` says what the matrix is: "diagonal" (the identity: a token is its own source), "ones" (the triangle of ones),
    "strict" (that without its diagonal), "full" (`matrix`), or "last": no t at all, the row of the last token.
    """

    sign: int
    row: Expr | None
    matrix: Expr | None
    column: Expr | None
    kind: str = "full"

    def whole(self) -> Expr:
        """row * matrix, with axes t and s."""
        matrix = self.matrix if self.kind == "full" else triangle(self.kind == "strict")
        assert matrix is not None
        assert self.kind not in ("diagonal", "last")
        return b.broadcast(matrix if self.row is None else b.mul(self.row, matrix), (T_AXIS, S_AXIS))


@dataclass(frozen=True)
class Response:
    """A value along the tokens of a chunk, in terms of what it found and of the gradients."""

    parts: tuple[InitialTerm, ...] = ()
    kernels: tuple[Transfer, ...] = ()

    def negated(self) -> Response:
        parts = tuple(replace(p, sign=-p.sign) for p in self.parts)
        return Response(parts, tuple(replace(k, sign=-k.sign) for k in self.kernels))

    def before(self) -> Response:
        """The value at the token before: x_{t-1}."""
        parts = tuple(
            p if p.coefficient is None and p.before == 1 else replace(p, coefficient=_before(p)) for p in self.parts
        )
        kernels = [
            replace(k, kind="strict")
            if k.kind == "ones" and k.row is None
            else Transfer(k.sign, None, b.shift(k.whole(), T_AXIS), k.column)
            for k in self.kernels
        ]
        return Response(parts, tuple(kernels))

    def last(self) -> Response:
        """The value at the last token, without an axis for t."""

        def end(e: Expr | None) -> Expr | None:
            return b.last(e, T_AXIS) if e is not None and T_AXIS in e.axes else e

        parts = tuple(replace(p, coefficient=end(p.coefficient)) for p in self.parts)
        kernels = []
        for k in self.kernels:
            matrix = end(k.matrix) if k.kind == "full" else None
            kernels.append(Transfer(k.sign, end(k.row), None, _times(matrix, k.column), "last"))
        return Response(parts, tuple(kernels))


GRADIENT = Response(kernels=(Transfer(1, None, None, None, "diagonal"),))


def held(*factors: Expr) -> Response:
    """A value from before the chunk, the same for all its tokens."""
    return Response(parts=(InitialTerm(1, factors, None, 1.0),))


class ChunkAlgebra:
    """The tokens of a chunk at once: values are responses, rates have an axis for the token."""

    def recur(self, before: Response | None, decay: Expr | None, added: Response) -> Response:
        parts = [_swept(p, decay) for p in added.parts]
        kernels = [_propagated(k, decay) for k in added.kernels]
        for p in before.parts if before is not None else ():
            product = None if decay is None else b.cumprod(over_tokens(decay), T_AXIS)
            parts.append(replace(p, coefficient=_times(p.coefficient, product)))
        return Response(_merged(parts), tuple(kernels))

    def scaled(self, x: Response, rate: Expr) -> Response:
        if is_const(rate, 1):
            return x
        parts = tuple(replace(p, coefficient=_times(rate, p.coefficient)) for p in x.parts)
        kernels = []
        for k in x.kernels:
            if k.kind == "diagonal":
                kernels.append(replace(k, column=_times(b.rename(rate, {T_AXIS: S_AXIS}), k.column)))
            else:
                kernels.append(replace(k, row=_times(rate, k.row)))
        return Response(parts, tuple(kernels))

    def plus(self, x: Response, y: Response) -> Response:
        return Response(_merged([*x.parts, *y.parts]), (*x.kernels, *y.kernels))

    def minus(self, x: Response, y: Response) -> Response:
        return self.plus(x, y.negated())

    def started(self, scale: Expr | None, decay: Expr | None, start: Expr) -> tuple[Expr | None, Response]:
        product = None if decay is None else b.cumprod(over_tokens(decay), T_AXIS)
        factors = (start,) if scale is None else (scale, start)
        end = None if product is None else b.last(product, T_AXIS)
        return _times(scale, end), Response(parts=(InitialTerm(1, factors, product, 1.0),))


def over_tokens(rate: Expr) -> Expr:
    """A rate with an entry for each token, also where it is a number or a param."""
    return b.broadcast(rate, (T_AXIS, *(a for a in rate.axes if a != T_AXIS)))


def triangle(strict: bool = False) -> Expr:
    """1 where s <= t (s < t if strict), else 0."""
    return b.mask(b.broadcast(const(1), (T_AXIS, S_AXIS)), T_AXIS, S_AXIS, strict=strict)


def _propagated(k: Transfer, decay: Expr | None) -> Transfer:
    """The kernel of x_t = decay_t * x_{t-1} + y_t from that of y."""
    if k.kind == "diagonal":
        matrix = None if decay is None else b.segprod(over_tokens(decay), T_AXIS, S_AXIS)
        return replace(k, matrix=matrix, kind="ones" if decay is None else "full")
    inner = b.rename(k.whole(), {T_AXIS: R_AXIS})
    return Transfer(k.sign, None, b.contract((_sweep(decay), inner), (R_AXIS,)), k.column)


def _swept(p: InitialTerm, decay: Expr | None) -> InitialTerm:
    """The part of x_t = decay_t * x_{t-1} + y_t that comes from a part of y: y is known, x was 0."""
    if p.coefficient is None:
        total = b.total(_sweep(decay), (R_AXIS,))
    else:
        total = b.contract((_sweep(decay), b.rename(over_tokens(p.coefficient), {T_AXIS: R_AXIS})), (R_AXIS,))
    return replace(p, coefficient=total, before=0.0)


def _sweep(decay: Expr | None) -> Expr:
    if decay is None:
        return b.rename(triangle(), {S_AXIS: R_AXIS})
    return b.segprod(over_tokens(decay), T_AXIS, R_AXIS)


def _before(p: InitialTerm) -> Expr:
    whole = const(1) if p.coefficient is None else p.coefficient
    return b.shift(over_tokens(whole), T_AXIS, p.before)


def _merged(parts: Sequence[InitialTerm]) -> tuple[InitialTerm, ...]:
    """Parts of the same value as one."""
    found: dict[tuple[Expr, ...], InitialTerm] = {}
    for p in parts:
        known = found.get(p.held)
        if known is None:
            found[p.held] = p
            continue
        one, other = (
            b.mul(const(x.sign), x.coefficient if x.coefficient is not None else const(1)) for x in (known, p)
        )
        found[p.held] = InitialTerm(1, p.held, b.add(one, other), known.sign * known.before + p.sign * p.before)
    return tuple(found.values())


def _times(x: Expr | None, y: Expr | None) -> Expr | None:
    if x is None or y is None:
        return y if x is None else x
    return b.mul(x, y)


def coefficients(response: Response) -> list[tuple[int, tuple[Expr, ...]]]:
    """The kernels as signed factors over (t, s): one matrix A where no channel is involved."""
    plain, result = [], []
    for k in response.kernels:
        given = [e for e in (k.row, k.matrix, k.column) if e is not None]
        if k.kind == "last":
            result.append((k.sign, tuple(given)))
        elif any(a not in (T_AXIS, S_AXIS) for e in given for a in e.axes):
            middle = k.matrix if k.kind == "full" else triangle(k.kind == "strict")
            result.append((k.sign, tuple(e for e in (k.row, middle, k.column) if e is not None)))
        else:
            plain.append(k)
    if plain:
        sign = plain[0].sign
        total = _matrix(plain[0])
        for k in plain[1:]:
            total = (b.add if k.sign == sign else b.sub)(total, _matrix(k))
        result.insert(0, (sign, (total,)))
    return result


def _matrix(k: Transfer) -> Expr:
    """A = row * matrix * column; a triangle of ones is the mask of row * column."""
    if k.kind == "full":
        product = _times(k.whole(), k.column)
        assert product is not None
        return product
    row, column = k.row, k.column
    if row is not None and column is not None and T_AXIS in row.axes and S_AXIS in column.axes:
        pair: Expr | None = b.contract((row, column), ())
    else:
        pair = _times(row, column)
    square = b.broadcast(const(1) if pair is None else pair, (T_AXIS, S_AXIS))
    return b.mask(square, T_AXIS, S_AXIS, strict=k.kind == "strict")
