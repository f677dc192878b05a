"""A scan as functions of a model: its chunk, and the loop that runs it.

A loop gives its chunk the chunks of a Scan and then what is left of the tokens: a Scan runs at least once, for ONNX
Runtime stops the process where it has nothing to do.

    tttc.drawn (W, k, ...) => (z, W_new) {
       ...
       z, W_new = If <then_branch = many_then () => (...) {
          W_head, z_head = Scan <body = chunk (...) => (...) { ... = tttc.drawn_chunk (...) }> (...)
          ... = If <...> (any_tail)
       }, else_branch = many_else () => (...) { ... = tttc.drawn_chunk (...) }> (any_many)
    }
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tttc.backends.onnx.lowering import Lowering
from tttc.ir.expr import Expr
from tttc.ir.names import marked, own, suffixed, unmarked
from tttc.ir.program import Scan, ScanProgram
from tttc.ir.program_text import type_text
from tttc.ir.text import Namer, Printer, steps

FEW_KEPT = "few'kept"


def loop_functions(scan: Scan, program: ScanProgram, kept: bool = False) -> list[str]:
    """A scan as `tttc.<name>`, its parameters in their order; of a loop also `tttc.<name>_chunk`."""
    return (
        [loop_function(scan, program.dims, kept), chunk_function(f"{scan.name}_chunk", scan, program)]
        if scan.loops
        else [chunk_function(scan.name, scan, program)]
    )


def block(head: str, inputs: Sequence[str], outputs: Sequence[str], lines: Sequence[str]) -> str:
    return "\n".join([f"{head} ({', '.join(inputs)}) => ({', '.join(outputs)}) {{", *(f"   {x}" for x in lines), "}\n"])


# -- one chunk ---------------------------------------------------------------------------------------------------------


def made(e: Expr) -> str:
    """What the new value of a leaf is called."""
    return marked(suffixed(e.name, "new"))


def chunk_function(name: str, scan: Scan, program: ScanProgram) -> str:
    """The block of a scan as a function: every value, with a comment that says what it is."""
    length = scan.chunk if scan.loops else program.plan.chunk
    lowering = Lowering(scan.params, program.dims, length if isinstance(length, int) else None)
    taken = {unmarked(marked(p.name)) for p in scan.params} | {unmarked(made(e)) for e in scan.results}
    shown = Printer()
    results = {a.leaf: a for a in scan.block.assigns}
    for step in steps(scan.block, Namer(taken, program.names)):
        target = results[step.target].target if step.target else None
        axes = target.axes if target else step.value.axes
        called = made(target) if target else marked(step.name)
        text = f"{marked(step.name)}: {type_text(axes, program.dtype)} = {shown.ordered(step.value, axes).text}"
        lowering.lines.append(f"# {unmarked(text)}")
        lowering.named(step.value, called, axes)
        if step.value.axes == axes:
            shown.names[step.value] = step.name
    lowering.drop_unused()
    inputs = [marked(p.name) for p in scan.params]
    return block(name, inputs, [made(e) for e in scan.results], lowering.lines)


# -- all chunks --------------------------------------------------------------------------------------------------------


def loop_function(scan: Scan, dims: Mapping[str, int], kept: bool = False) -> str:
    """The chunks of a Scan, and the rest; or a chunk that is all, where there are fewer tokens. With `kept` it is
    called `tttc.<name>_kept` and also gives what was carried before the rest.
    """
    T, none, C, chunks = (marked(own(x)) for x in ("T", "none", "C", "chunks"))
    lines = [
        f"{T} = Shape <start = 1, end = 2> ({marked(scan.sequence[0].name)})",
        f"{none} = Constant <value = int64[1] {{0}}> ()",
    ]
    carried = [a.target for a in scan.updates] if kept else []
    results = [*(made(e) for e in scan.results), *(part_of(e, "kept") for e in carried)]
    few, few_made = _few(scan, dims), [*(part_of(e, "few") for e in scan.results)]
    few += (f"{part_of(e, FEW_KEPT)} = Identity ({part_of(e, '')})" for e in carried)
    few_made += (part_of(e, FEW_KEPT) for e in carried)
    if isinstance(scan.chunk, int):
        parts = [part_of(e, "joined" if e.at else "tail") for e in scan.results]
        parts += (part_of(e, "head") for e in carried)
        lines += [
            f"{C} = Constant <value = int64[1] {{{scan.chunk}}}> ()",
            f"{chunks} = Div ({T}, {C})",
            *choose("many", f"Greater ({chunks}, {none})", results, (_many(scan, dims), parts), (few, few_made)),
        ]
    else:
        lines += [*few, *(f"{x} = Identity ({y})" for x, y in zip(results, few_made, strict=True))]
    name = f"{scan.name}_kept" if kept else scan.name
    return block(name, [marked(p.name) for p in scan.params], results, lines)


def _few(scan: Scan, dims: Mapping[str, int]) -> list[str]:
    """One chunk, as long as the call."""
    condition = f"Greater ({marked(own('T'))}, {marked(own('none'))})"
    return where(condition, "few", scan, dims, [call(f"{scan.name}_chunk", scan, "few'then", "", "")])


def _many(scan: Scan, dims: Mapping[str, int]) -> list[str]:
    """Whole chunks, the rest, and the outputs of both."""
    T, none, C, chunks, first, whole = (marked(own(x)) for x in ("T", "none", "C", "chunks", "first", "whole"))
    rest = [f"{part_of(s, 'rest')} = Slice ({marked(s.name)}, {whole}, {T}, {first})" for s in scan.sequence]
    rest.append(call(f"{scan.name}_chunk", scan, "tail'then", "head", "rest"))
    joined = (f"({part_of(a.target, 'head')}, {part_of(a.target, 'tail')})" for a in scan.outputs)
    return [
        f"{first} = Constant <value = int64[1] {{1}}> ()",
        f"{whole} = Mul ({chunks}, {C})",
        *_scan(scan, none, first, whole),
        *where(f"Greater ({T}, {whole})", "tail", scan, dims, rest, "head"),
        *(f"{part_of(a.target, 'joined')} = Concat <axis = 1> {x}" for a, x in zip(scan.outputs, joined, strict=True)),
    ]


def part_of(e: Expr, part: str) -> str:
    """What a leaf is called in a part of the graph."""
    return marked(suffixed(e.name, part) if part else e.name)


def call(function: str, scan: Scan, results: str, carry: str, sequence: str) -> str:
    """A function of a scan, called with the parts of the graph that are named."""
    given = [part_of(e, carry) for e in scan.carry] + [part_of(e, "") for e in scan.fixed]
    given += [part_of(e, sequence) for e in scan.sequence]
    found = ", ".join(part_of(e, results) for e in scan.results)
    return f"{found} = tttc.{function} ({', '.join(given)})"


def empty(e: Expr, scan: Scan, dims: Mapping[str, int], part: str) -> list[str]:
    """An output for no tokens: as long as it is elsewhere along its other axes."""
    names = [part_of(e, f"{part}'{i}") for i in range(len(e.axes) + 1)]
    lines = [f"{names[0]} = Shape <start = 0, end = 1> ({marked(scan.params[0].name)})"]
    lines.append(f"{names[1]} = Constant <value = int64[1] {{0}}> ()")
    for name, axis in zip(names[2:], e.axes[1:], strict=True):
        if axis.size in dims:
            lines.append(f"{name} = Constant <value = int64[1] {{{dims[axis.size]}}}> ()")
            continue
        p, at = next((p, i + 1) for p in scan.params for i, a in enumerate(p.axes) if a.size == axis.size)
        lines.append(f"{name} = Shape <start = {at}, end = {at + 1}> ({marked(p.name)})")
    shape = part_of(e, f"{part}'shape")
    lines.append(f"{shape} = Concat <axis = 0> ({', '.join(names)})")
    return [*lines, f"{part_of(e, part)} = ConstantOfShape ({shape})"]


Branch = tuple[Sequence[str], Sequence[str]]
"""The lines of a graph inside of another, and the names that it gives."""


def choose(part: str, condition: str, results: Sequence[str], then: Branch, otherwise: Branch) -> list[str]:
    """Names for what one of two branches gives."""
    asked = marked(own(f"any_{part}"))
    return [
        f"{asked} = {condition}",
        f"{', '.join(results)} = If <then_branch = {part}_then () => ({', '.join(then[1])}) {{",
        *(f"   {x}" for x in then[0]),
        f"}}, else_branch = {part}_else () => ({', '.join(otherwise[1])}) {{",
        *(f"   {x}" for x in otherwise[0]),
        f"}}> ({asked})",
    ]


def where(
    condition: str,
    part: str,
    scan: Scan,
    dims: Mapping[str, int],
    then: Sequence[str],
    before: str = "",
    otherwise: Sequence[str] | None = None,
) -> list[str]:
    """The results of a part of the tokens; where there are none of it, no outputs and the carry of the part before,
    unless another branch is given.
    """
    yes, no = f"{part}'then", f"{part}'else"
    if otherwise is None:
        otherwise = [x for a in scan.outputs for x in empty(a.target, scan, dims, no)]
        otherwise += (f"{part_of(a.target, no)} = Identity ({part_of(a.target, before)})" for a in scan.updates)
    found, then_made, else_made = ([part_of(e, x) for e in scan.results] for x in (part, yes, no))
    return choose(part, condition, found, (then, then_made), (otherwise, else_made))


def _scan(scan: Scan, none: str, first: str, whole: str) -> list[str]:
    """The whole chunks: sequences cut into them, a Scan over these, and its outputs as sequences again."""
    lines = []
    for s in scan.sequence:
        lines.append(f"{part_of(s, 'whole')} = Slice ({part_of(s, '')}, {none}, {whole}, {first})")
        lines += _reshaped(s, "whole", "chunks", [0, -1, scan.chunk], 2)
    inputs = [*(part_of(e, "in") for e in scan.carry), *(part_of(e, "chunk") for e in scan.sequence)]
    carried, stored = [a.target for a in scan.updates], [a.target for a in scan.outputs]
    outputs = [part_of(e, "out") for e in (*carried, *stored)]
    found = [*(part_of(e, "head") for e in carried), *(part_of(e, "stacked") for e in stored)]
    given = [*(part_of(e, "") for e in scan.carry), *(part_of(e, "chunks") for e in scan.sequence)]
    settings = [f"num_scan_inputs = {len(scan.sequence)}", f"scan_input_axes = {[1] * len(scan.sequence)}"]
    settings += [f"scan_output_axes = {[1] * len(stored)}"] if stored else []
    lines += [
        f"{', '.join(found)} = Scan <{', '.join(settings)}, body = chunk ({', '.join(inputs)}) => "
        f"({', '.join(outputs)}) {{",
        f"   {call(f'{scan.name}_chunk', scan, 'out', 'in', 'chunk')}",
        f"}}> ({', '.join(given)})",
    ]
    return [*lines, *(x for e in stored for x in _reshaped(e, "stacked", "head", [0, -1], 3))]


def _reshaped(e: Expr, part: str, to: str, first: Sequence[object], kept: int) -> list[str]:
    """A part of a sequence in another shape: N, then what is given, then its axes from number `kept` on."""
    begin, end, shape = (part_of(e, f"{part}'{x}") for x in ("begin", "end", "shape"))
    return [
        f"{begin} = Constant <value = int64[{len(first)}] {{{', '.join(map(str, first))}}}> ()",
        f"{end} = Shape <start = {kept}> ({part_of(e, part)})",
        f"{shape} = Concat <axis = 0> ({begin}, {end})",
        f"{part_of(e, to)} = Reshape ({part_of(e, part)}, {shape})",
    ]
