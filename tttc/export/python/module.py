"""The module of a layer as text: the state, the loops, and the class, without its calls."""

from __future__ import annotations

from tttc.backends.torch.functions import assigned, listed
from tttc.export.ports import Port
from tttc.export.python.call import forward, unpacked
from tttc.export.python.facts import WORDS, Facts, called
from tttc.ir.names import function, marked
from tttc.ir.program import ScanKind


def state_class(of: Facts) -> str:
    """The named tuple of what a sequence carries."""
    lines = [
        "class State(NamedTuple):",
        '    """Where a sequence stands: what a call returns, and continues from."""',
        "",
    ]
    for p, field in zip(of.held, of.fields, strict=True):
        length = {"rows": ["rows"], "taps": [str(n) for n in p.taps]}.get(p.group, [])
        shape = ", ".join(["B", "H", *length, *map(str, p.dims)])
        lines.append(f"    {field}: torch.Tensor  # [{shape}]{_about(p)}")
    lines += ["    position: int = 0  # tokens of the open mini-batch"] if of.opens else []
    return "\n".join(lines)


def _about(p: Port) -> str:
    said = {
        "start": "where the mini-batch began",
        "summed": "what the mini-batch has added" if p.begins == 0 else "what is left of where it began",
        "rows": "the tokens of the open mini-batch",
        "taps": "the last tokens",
        "memory": "beside the weights",
    }
    return f" {said[p.group]}" if p.group in said else ""


def loops(of: Facts, digest: str) -> str:
    """The loops over chunks, and their operators."""
    lines, names = [], []
    for kind in (ScanKind.WHOLE, ScanKind.OPEN):
        if (scan := of.scans.get(kind)) is None:
            continue
        step = called(kind)
        name = f'"{_ascii(of.program.name)}_{WORDS[kind]}_{digest}"'
        counts = [f"carried={len(scan.carry)}", f"fixed={len(scan.fixed)}", f"sequences={len(scan.sequence)}"]
        adjoint = marked(function(f"{WORDS[kind]}_adjoint"))
        arguments = [name, step, adjoint, *counts, f"width={of.width!r}"]
        if of.kernels and WORDS[kind] in of.kernels.made:
            kernels = f"{WORDS[kind].upper()}_KERNELS"
            lines += listed(f"{kernels} = {of.kernels.head}", of.kernels.made[WORDS[kind]], ")")
            arguments.append(f"kernels={kernels}")
        lines += listed(f"{WORDS[kind].upper()} = Loop(", arguments, ")")
        names.append(WORDS[kind].upper())
    return "\n".join([*lines, *(f"register({n})" for n in names)])


def module(of: Facts, about: str) -> str:
    """The class of the layer."""
    lines = [f"class {of.title}(torch.nn.Module):", *about.splitlines(), ""]
    return "\n".join([*lines, *_init(of), "", *_begin(of), "", *forward(of)])


def _init(of: Facts) -> list[str]:
    given = ["*", *(f"{marked(p.name)}: torch.Tensor" for p in of.drawn)] if of.drawn else []
    lines = listed("    def __init__(", ["self", "num_heads: int", "every: int = 1", *given], ") -> None:")
    lines += ["        super().__init__()", "        self.num_heads = num_heads"]
    lines.append("        self.every = every  # chunks between two states kept for the backward: more take less memory")
    lines.append("        self.operators = False  # whether the loops are called by their operators, as in graphs")
    for p in of.of("param", "weights"):
        made = of.initial(p) or f"{marked(p.name)}.expand({', '.join(of.shape(p))}).clone()"
        lines.append(f"        self.{of.attributes[p.name]} = torch.nn.Parameter({made})")
    return lines


def _begin(of: Facts) -> list[str]:
    weights = of.of("weights")
    names = [of.variable(p) for p in weights]
    dtype = f"torch.promote_types(self.{of.attributes[weights[0].name]}.dtype, torch.float32)"
    lines = [
        "    def begin(self, batch: int) -> State:",
        '        """Where a sequence begins."""',
        f"        dtype = {dtype}",
        *unpacked("        ", names, "spread(x, batch, dtype)", [f"self.{of.attributes[p.name]}" for p in weights]),
    ]
    if (scan := of.scans.get(ScanKind.BEGIN)) is not None:
        made, given = ([marked(p.name) for p in group] for group in (scan.results, scan.params))
        lines += assigned("        ", made, "exact(", [called(ScanKind.BEGIN), *given], ")")
    values = []
    for p in of.held:
        length = {"rows": [0], "taps": p.taps}.get(p.group, [])
        shape = ", ".join(map(str, ["batch * self.num_heads", *length, *p.dims]))
        begun = {"weights": of.variable(p), "memory": marked(p.name), "start": marked(p.name)}
        values.append(begun.get(p.group) or f"{names[0]}.new_{'zeros' if p.begins == 0 else 'ones'}({shape})")
    lines += listed("        held = (", values, f"{',' * (len(values) == 1)})", each=True)
    return [*lines, "        return State(*(x.unflatten(0, (batch, self.num_heads)) for x in held))"]


def _ascii(name: str) -> str:
    return "".join(c if c.isascii() else "x" for c in name)
