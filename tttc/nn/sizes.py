"""The sizes of a declaration in a module: what is not given follows from the width, what does not fit is said."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from tttc.declare.number import whole
from tttc.declare.variant import Signature, bind
from tttc.errors import Problem, ShapeError, problems_text


def sizes_of(
    declared: Signature,
    hidden_size: int,
    num_heads: int,
    dims: Mapping[str, int],
    rope: bool,
    conv_kernel: int | None,
) -> dict[str, int]:
    """The size of each dim that the declaration mentions; `ShapeError` lists everything that does not fit."""
    asked = {"hidden_size": hidden_size, "num_heads": num_heads, **dims}
    bad = [f"{n} is {size!r}" for n, size in asked.items() if whole(size) is None or int(size) < 1]
    if bad:
        raise ShapeError(problems_text(declared.name, [Problem(f"{', '.join(bad)}.", "A size is a positive int.")]))
    if hidden_size % num_heads:
        near = [n for n in range(1, hidden_size + 1) if hidden_size % n == 0]
        near = sorted(sorted(near, key=lambda n: abs(n - num_heads))[:4])
        what = f"hidden_size {hidden_size} is not a multiple of num_heads {num_heads}."
        remedy = f"Take num_heads from {', '.join(map(str, near))}, or another hidden_size."
        raise ShapeError(problems_text(declared.name, [Problem(what, remedy)]))
    head = hidden_size // num_heads
    sizes = {"D": head, "E": head, "F": 4 * head, **dims}
    problems = []
    if sizes["D"] != head:
        what = f"dims has D = {dims['D']}, but the head width is {hidden_size} / {num_heads} = {head}."
        problems.append(Problem(what, "Leave D out of dims, or change num_heads."))
    if unknown := [dim for dim in dims if dim not in (*declared.dims, "D")]:
        what = f"dims gives {', '.join(unknown)}, which the declaration does not mention."
        problems.append(Problem(what, f"Its dims are {', '.join(declared.dims)}."))
    if missing := [dim for dim in declared.dims if dim not in sizes]:
        given = ", ".join(f'"{dim}": ...' for dim in missing)
        problems.append(Problem(f"the size of {', '.join(missing)} is not known.", f"Give it: dims={{{given}}}."))
    problems += [] if missing else _token_problems(declared, sizes, rope, conv_kernel)
    if problems:
        raise ShapeError(problems_text(declared.name, problems))
    return {dim: sizes[dim] for dim in declared.dims}


def _token_problems(
    declared: Signature, sizes: Mapping[str, int], rope: bool, conv_kernel: int | None
) -> Iterator[Problem]:
    shapes = {name: [sizes[dim] for dim in declared.tokens[name].given] for name in ("q", "k")}
    for name, shape in shapes.items():
        if rope and (len(shape) != 1 or shape[0] % 2):
            what = f"rope=True turns pairs of channels, but `{name}` has the shape {shape} per head."
            yield Problem(what, "Choose num_heads so that the head width is even, or pass rope=False.")
    if conv_kernel is not None and conv_kernel < 1:
        remedy = "It counts the tokens that a convolution sees: at least 1, or None."
        yield Problem(f"conv_kernel is {conv_kernel}.", remedy)
    if conv_kernel is not None and shapes["q"] != shapes["k"]:
        made = f"conv_kernel={conv_kernel} makes q and k from one projection"
        what = f"{made}, but q is {shapes['q']} and k {shapes['k']}."
        yield Problem(what, "Leave conv_kernel out, or declare q and k over one axis.")


def output_shape(declared: Signature, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of what `output` returns for one token, found by calling it on zeros."""

    def zeros(dims: tuple[str, ...]) -> Tensor:
        return torch.zeros([sizes[dim] for dim in dims], dtype=torch.float64, device="cpu")

    values = {name: zeros(spec.dims) for name, spec in (declared.states | declared.params).items()}
    values |= {name: zeros(spec.dims) for name, spec in declared.tokens.items() if name not in ("q", "k", "v")}
    values |= {name: zeros(declared.gates[gate].dims) for name, gate in declared.attributes.items()}
    found = tuple(bind(declared.variant, values).output(zeros(declared.tokens["q"].dims)).shape)
    if len(found) != 1:
        what = f"the output of one token has the shape {list(found)}."
        raise ShapeError(
            problems_text(declared.name, [Problem(what, "`output` (or `learner`) must return one vector.")])
        )
    return found
