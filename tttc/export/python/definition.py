"""The definition of a layer as text: token by token, and the test that compares the layer with it."""

from __future__ import annotations

from tttc.backends.interface import FileKernels
from tttc.backends.torch.functions import Writer, assigned, block_function, listed, returned, token_loops
from tttc.export.python.facts import LONGEST_TESTED, Facts
from tttc.ir.expr import Expr, leaf
from tttc.ir.names import differential, function, marked, own, size_of, spelled
from tttc.ir.primal import declared_loop
from tttc.ir.program import EACH, GradientProgram, TokenProgram, blocks
from tttc.verification.inputs import random_inputs

TESTED = 8  # tokens of a mini-batch in the test of a file, where they are more than LONGEST_TESTED
DRAWN = 64  # tokens, of which the domains of the test are taken


def declared_functions(of: Facts) -> list[str]:
    """The loss and the output of one token, as declared."""
    program = of.layer.stages.of(TokenProgram)
    made = []
    for name, doc in (("loss", "What one token asks for."), ("output", "What one token reads.")):
        (block,) = blocks(program[name].body)
        made.append(block_function(f"token_{name}", program[name].params, block, program, doc, alone=True))
    return made


def values(of: Facts) -> list[Expr]:
    """All that the definition computes: what its text calls has to be in the file."""
    program, anchors = declared_loop(of.layer.stages.of(GradientProgram))
    token = of.layer.stages.of(TokenProgram)
    functions = (token["loss"], token["output"], *program.functions)
    return [*anchors.values(), *(a.value for f in functions for x in blocks(f.body) for a in x.assigns)]


def definition(of: Facts) -> str:
    """The layer token by token."""
    program, anchors = declared_loop(of.layer.stages.of(GradientProgram))
    (loops,) = program.functions
    weights = program.update.states
    loss = of.layer.stages.of(TokenProgram)["loss"]

    def gradients(writer: Writer, indent: str) -> list[str]:
        given = [marked(p.name) + f"[:, {marked(own('t'))}]" * (p.name in of.sequences) for p in loss.params]
        names = ", ".join(marked(w.name) for w in weights)
        call = f"lambda {names}: {marked(function('token_loss'))}({', '.join(given)})"
        at = [writer.printer.ordered(anchors[w.name], w.axes).text for w in weights]
        return assigned(indent, [marked(differential(w.name)) for w in weights], "gradients(", [call, *at], ")")

    parameters = [leaf(n, "token") for n in of.sequences]
    parameters += [leaf(p.name, p.group) for p in of.of("param", "weights")]
    lines = _definition_head(of)
    if any(EACH.name == p.name for p in loops.params):
        lines.append(f"    {marked(EACH.name)} = {marked(of.sequences[0])}.new_ones({marked(own('G'))}, {_all})")
    lines += token_loops(loops, program, gradients, parameters, "MINI_BATCH" if of.mini_batch else None)
    z, *after = (marked(r.name) for r in loops.returns)
    return "\n".join([*lines, *returned("    ", [f"torch.stack({z}, 1)", *after])])


_all = marked(size_of(own("T")))


def _definition_head(of: Facts) -> list[str]:
    """The lines before its loops."""
    names = [*of.sequences, *(p.name for p in of.of("param", "weights"))]
    lines = listed(f"def {marked(function('definition'))}(", list(map(marked, names)), "):")
    said = "What the layer is, token by token, the gradient of each by torch.autograd: [B * H, T, ...]."
    lines += [f'    """{said}"""', f"    {marked(own('G'))}, {_all} = {marked(of.sequences[0])}.shape[:2]"]
    for p in of.of("taps"):
        x = marked(p.name)
        lines.append(f"    {x}, _ = windows({x}, {x}.new_zeros({x}.shape[0], {p.taps[0]}, *{x}.shape[2:]))")
    return lines


# -- the self-test


def self_test(of: Facts) -> str:
    """What `python layer.py` runs."""
    b = of.mini_batch
    short = b is not None and b > LONGEST_TESTED
    b = TESTED if short else b
    T = 19 if b is None else b + 3
    cuts = [c for c in (1, 7, 7, (b or 9) + 1) if c < T]  # a call of no tokens among them
    cuts = cuts if of.declared.read != "end" or not of.opens else [] if b is None else [b, b]
    domains = _domains(of)
    lines = ["def self_test() -> bool:"]
    lines.append('    """Compare the layer with its definition, in float64: outputs, weights and every gradient."""')
    if short:
        lines += ["    global MINI_BATCH", f"    MINI_BATCH = {TESTED}  # a short one, so that the test is"]
    stand_ins = [f"{spelled(p.name)}=torch.zeros({', '.join(map(str, p.dims))})" for p in of.drawn]
    lines += listed(f"    layer = {of.title}(", ["num_heads=2", *stand_ins], ").double()")
    lines += ["    torch.manual_seed(0)", "    with torch.no_grad():"]
    lines += [f"        layer.{of.attributes[p.name]}.uniform_{domains[p.name]}" for p in of.of("param", "weights")]
    lines.append("    given = [")
    for p in of.of("token", "gate"):
        shape = ", ".join(map(str, [2, T, 2, *p.dims]))
        drawn = f"randn({shape})" if p.group == "token" else f"empty({shape}).uniform_{domains[p.name]}"
        settings = "dtype=torch.float64"
        drawn = drawn.replace(f"({shape})", f"({shape}, {settings})", 1)
        lines.append(f"        torch.{drawn}.requires_grad_(),  # {spelled(p.name)}")
    weights, params = (list(map(spelled, (p.name for p in of.of(g)))) for g in ("weights", "param"))
    pulled = [*map(spelled, of.sequences), *params, *weights]
    names = [f'"{n}"' for n in ("z", *weights, *(f"d{n}" for n in pulled))]
    lines += ["    ]", *listed("    names = [", names, "]", each=True)]
    call = f"compare(layer, {marked(function('definition'))}, given, names, {cuts}"
    return "\n".join([*lines, *(_with_kernels(call, of.kernels) if of.kernels else [f"    return {call})"])])


def _with_kernels(call: str, kernels: FileKernels) -> list[str]:
    """The lines that compare the layer with its definition, and its kernels where they run."""
    some = f"{next(iter(kernels.made)).upper()}_KERNELS"
    return [
        f"    right = {call})",
        '    device = "cuda" if torch.cuda.is_available() else "cpu"',
        f'    if right and {some} and (device == "cuda" or {some}.interpreted):',
        '        print(f"by kernels, in float32 on the device {device}:")',
        f"        right &= {call}, device, torch.float32)",
        "    return right",
    ]


def _domains(of: Facts) -> dict[str, str]:
    """Where each gate, param and weight is drawn from: as the declaration has them."""
    inputs = random_inputs(of.declared, of.layer.dims, 1, DRAWN, 2)
    gates = {of.declared.identity("gate", n): x for n, x in inputs.gates.items()}
    drawn = {**gates, **inputs.params, **inputs.state}
    return {n: f"({float(x.detach().min()):.3g}, {float(x.detach().max()):.3g})" for n, x in drawn.items()}
