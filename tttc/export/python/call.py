"""How the call of a layer goes over its tokens, as text: the one case of `runtime/sequencing.py` that a program is."""

from __future__ import annotations

from collections.abc import Sequence

from tttc.backends.torch.functions import assigned, listed
from tttc.export.ports import Port
from tttc.export.python.facts import WORDS, Facts, called, tuple_of
from tttc.ir.expr import Expr
from tttc.ir.names import marked, spelled, suffixed
from tttc.ir.program import EACH, ScanKind

COUNTED = "        tokens.append(tokens[0].new_ones(tokens[0].shape[:2]))  # of which programs count how many there are"


def forward(of: Facts) -> list[str]:
    """The method that a call of the module runs."""
    names = [marked(n) for n in of.sequences]
    q = names[0]
    arguments = ["self", *(f"{n}: torch.Tensor" for n in names), "state: State | None = None"]
    lines = listed("    def forward(", arguments, ") -> tuple[torch.Tensor, State]:")
    lines += [
        *_forward_doc(of),
        f"        B, T, H = {q}.shape[:3]",
        "        if self.num_heads != H:",
        f'            raise ValueError(f"{{H}} heads of {spelled(of.sequences[0])}, {{self.num_heads}} of the layer")',
        "        state = self.begin(B) if state is None else state",
        *_refusal(of),
        f"        dtype = torch.float64 if {q}.dtype == torch.float64 else torch.float32",
        *listed("        tokens = [flat(x, dtype) for x in (", names, f"{',' * (len(names) == 1)})]"),
    ]
    if EACH.name in of.read and not of.rows:
        lines.append(COUNTED)
    params = of.of("param")
    if params:
        given = [f"self.{of.attributes[p.name]}" for p in params]
        lines += unpacked("        ", [of.variable(p) for p in params], "spread(x, B, dtype)", given)
    held = [of.variable(p) for p in of.held]
    source = "state[:-1]" if of.opens else "state"
    lines += assigned("        ", held, "(", [f"x.flatten(0, 1).to(dtype) for x in {source}"], ")")
    for p in of.of("taps"):
        i, name = of.sequences.index(p.name), of.variable(p)
        lines.append(f"        tokens[{i}], {name} = windows(tokens[{i}], {name})")
    lines += _in_rows(of) if of.rows else _in_sums(of) if of.opens else _freely(of)
    empty = f"tokens[0].new_zeros({', '.join(map(str, ['B * H', 0, *of.width]))})"
    lines += [
        f"        z = torch.cat(found, 1) if found else {empty} + 0 * tokens[0].sum()",
        *listed("        held = (", held, f"{',' * (len(held) == 1)})", each=True),
        f"        after = State(*(x.unflatten(0, (B, H)) for x in held){', position' * of.opens})",
        f"        return z.unflatten(0, (B, H)).transpose(1, 2).to({q}.dtype), after",
    ]
    return lines


def _forward_doc(of: Facts) -> list[str]:
    shaped = [f"{spelled(p.name)} [{', '.join(['B', 'T', 'H', *map(str, p.dims)])}]" for p in of.of("token", "gate")]
    z = ", ".join(["B", "T", "H", *map(str, of.width)])
    return [
        f'        """z [{z}], and where the sequence stands after the last token.',
        "",
        *(f"        {x}" for x in shaped),
        '        """',
    ]


def _refusal(of: Facts) -> list[str]:
    """read="end": nothing is read before a mini-batch ends."""
    if of.declared.read != "end" or not of.opens:
        return []
    return [
        "        if state.position and T:",
        '            raise ValueError("tokens read the end of their mini-batch: a call begins where one does")',
    ]


# -- calls


def _run(of: Facts, kind: ScanKind, indent: str, sliced: str, rename: dict[str, str]) -> list[str]:
    """z of some tokens, and the new carry."""
    scan = of.scans[kind]
    indices = [of.read.index(p.name) for p in scan.sequence]
    tokens = "tokens" if indices == list(range(len(of.read))) else f"(tokens[i] for i in {tuple(indices)})"
    if sliced:
        tokens = f"[x[:, {sliced}] for x in {tokens}]"
    elif tokens != "tokens":
        tokens = f"[*{tokens}]"

    def group(variables: Sequence[Expr]) -> str:
        return tuple_of([rename.get(p.name, marked(p.name)) for p in variables])

    targets = ["z", *(marked(a.leaf.name) for a in scan.updates)]
    given = [
        WORDS[kind].upper(),
        group(scan.carry),
        group(scan.fixed),
        tokens,
        _chunk(of),
        "self.every",
        "self.operators",
    ]
    return assigned(indent, targets, "run(", given, ")")


def _chunk(of: Facts) -> str:
    """How many tokens a loop takes at a time."""
    chunk = of.plan.chunk
    if not isinstance(chunk, int):
        return "stop - now"
    return "MINI_BATCH" if chunk == of.mini_batch else str(chunk)


def _freely(of: Facts) -> list[str]:
    """All tokens of a call at once: a mini-batch cannot be told from another."""
    run = _run(of, ScanKind.WHOLE, " " * 12, "", {})
    return ["        found = []", "        if T:", *run, "            found.append(z)"]


def _in_sums(of: Facts) -> list[str]:
    """What is left of an open mini-batch, whole ones, and what opens another."""
    starts = {p.name: of.variable(p) for p in of.of("start")}
    again = [f"{x} = {marked(n)}" for n, x in starts.items()]
    lines = ["        position, found, now = state.position, [], 0", "        while now < T:"]
    indent = " " * 12
    if ScanKind.WHOLE in of.scans:
        lines += [
            "            if position == 0 and T - now >= MINI_BATCH:  # whole mini-batches",
            "                stop = T - (T - now) % MINI_BATCH",
            *_run(of, ScanKind.WHOLE, " " * 16, "now:stop", {}),
            *(f"                {x}" for x in again),
            "            else:  # a part of one",
        ]
        indent = " " * 16
    lines.append(f"{indent}stop = {'min(T, now + MINI_BATCH - position)' if of.mini_batch else 'T'}")
    lines += _run(of, ScanKind.OPEN, indent, "now:stop", starts) + _closing(of, indent, starts)
    if of.mini_batch:
        ended = [f"{marked(n)} = {marked(suffixed(n, 'ended'))}" for n in _ended(of)]
        lines.append(f"{indent}position = (position + stop - now) % MINI_BATCH")
        lines.append(f"{indent}if position == 0:  # the next token begins another")
        lines += [f"{indent}    {x}" for x in (*again, *map(_fresh, of.of("summed")), *ended)]
    else:
        lines.append(f"{indent}position += T")
    return [*lines, "            found.append(z)", "            now = stop"]


def _ended(of: Facts) -> list[str]:
    """The memories that change only where a mini-batch ends."""
    weights = {p.name for p in of.of("weights")}
    return [a.leaf.name for a in of.scans[ScanKind.CLOSE].updates if a.leaf.name not in weights]


def _closing(of: Facts, indent: str, starts: dict[str, str]) -> list[str]:
    """The weights that the mini-batch would hand on."""
    scan = of.scans[ScanKind.CLOSE]
    given = []
    for p in scan.params:
        last = p.name in of.read
        given.append(f"tokens[{of.read.index(p.name)}][:, stop - 1]" if last else starts.get(p.name, marked(p.name)))
    names = [marked(suffixed(a.leaf.name, "ended") if a.leaf.name in _ended(of) else a.leaf.name) for a in scan.updates]
    return assigned(indent, names, "exact(", [called(ScanKind.CLOSE), *given], ")")


def _fresh(p: Port) -> str:
    x = marked(p.name)
    return f"{x} = torch.{'zeros' if p.begins == 0 else 'ones'}_like({x})"


def _in_rows(of: Facts) -> list[str]:
    """Whole mini-batches; an open one is run again from its first token."""
    b = of.mini_batch
    rows = [of.variable(p) for p in of.of("rows")]
    kept = {marked(p.name): of.variable(p) for p in of.of("start")}
    kept |= {marked(p.name): marked(suffixed(p.name, "kept")) for p in of.of("memory")}
    fixed = {p.name: of.variable(p) for p in of.of("start")}
    ends = "(position + T) // MINI_BATCH * MINI_BATCH, position + T" if b else "position + T,"
    keep = [f"{x} = {w}" for w, x in kept.items()]
    lines = [
        *listed("        rows = (", rows, f"{',' * (len(rows) == 1)})", each=True),
        "        tokens = [torch.cat([before, x], 1) for before, x in zip(rows, tokens, strict=True)]",
        *([COUNTED] if of.sequencing.counts else []),
        "        position, found, now = state.position, [], 0",
        *(f"        {marked(n)} = {x}" for n, x in fixed.items()),
        f"        for stop in ({ends}):",
        "            if now < stop:",
        *(f"                {x}" for x in keep),
        *_run(of, ScanKind.WHOLE, " " * 16, "now:stop", {}),
        "                found.append(z)",
        "                begun, now = now, stop",
    ]
    return lines + _rows_after(of, rows, keep)


def _rows_after(of: Facts, rows: list[str], keep: list[str]) -> list[str]:
    """What the next call has to know: nothing of a mini-batch that has ended."""
    lines = ["        if found:", "            found = [torch.cat(found, 1)[:, position:]]"]
    if of.mini_batch:
        lines += [
            "            position = (position + T) % MINI_BATCH",
            "            if position == 0:  # the next token begins another",
            "                begun = now",
            *(f"                {x}" for x in keep),
        ]
    else:
        lines.append("            position += T")
    memories = [f"            {marked(p.name)} = {marked(suffixed(p.name, 'kept'))}" for p in of.of("memory")]
    tokens = "tokens[:-1]" if of.sequencing.counts else "tokens"
    return [*lines, *memories, *assigned(" " * 12, rows, "(", [f"x[:, begun:] for x in {tokens}"], ")")]


def unpacked(indent: str, names: Sequence[str], value: str, of: Sequence[str]) -> list[str]:
    """a, b = (f(x) for x in (p, q))"""
    return assigned(indent, names, "(", [f"{value} for x in {tuple_of(of)}"], ")")
