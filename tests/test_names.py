"""Names that meet: any identifier is the name of a state, a param, a gate, a token, a dim or a class.

Each hard name has every role once, on every backend, against the oracle; and names that differ by what the compiler
derives from one of them stand side by side.
"""

from __future__ import annotations

import ast
import builtins
import keyword
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import tttc
from tests.helpers import differences, keywords, oracle_result, result_of, split_call
from tttc.backends.triton.emit import emit_source as emit_triton
from tttc.errors import DeclarationError, ShapeError
from tttc.ir.names import is_declared, marked, own, prefixed, spelled, suffixed, worded
from tttc.ir.verify import MalformedProgram, verify
from tttc.verification.comparison import relative_error
from tttc.verification.inputs import random_inputs

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning"),
    pytest.mark.usefixtures("plain_kernels"),  # names are in what is written
]

NAMES = (
    *("C", "c", "T", "z", "m", "F", "G", "list", "torch", "aten"),
    *("saved", "dW", "S_W", "W_start", "W_out", "W_T", "W_kept", "row_0", "past_0", "q_c"),
    *("d", "x", "g", "b", "h", "i", "t", "n", "n_tokens", "len"),
    *("range", "sum", "exp", "print", "tl", "dot", "int", "half", "_", "η"),
)  # fmt: skip
PAIRS = ("W", "W_out", "W_T", "W_kept", "W_work", "W_in", "W_c", "dW", "S_W", "M_W", "a_W", "W_start", "dW_out")
CLASSES = (
    *("Lambda", "Torch", "Global", "Huber", "List", "Class", "Aten", "F", "Import", "None_", "Tl", "Triton", "Segprod"),
    *("Shift", "SolveLower", "Gelu", "Exp", "Malloc", "Main", "Int", "Float", "Dot", "W", "Print", "Chunk", "Zip", "Λ"),
)  # fmt: skip
ROLES = 5
# of float32, and of float64 as in tttc.verify; some hundred operations in a row, twice as many in the backward
ALLOWED = {torch.float32: (5e-6, 1e-5), torch.float64: (1e-12, 1e-11)}
tvm, triton = (pytest.mark.skipif(find_spec(n) is None, reason=f"there is no {n}") for n in ("tvm", "triton"))
BACKENDS = ["torch", pytest.param("tvm", marks=tvm), pytest.param("triton", marks=triton)]


def crowded(turn, backend):
    """A declaration whose states, params, gates, tokens and dims have each a fifth of the names, which turn."""
    size = len(NAMES) // ROLES
    blocks = [NAMES[i * size : (i + 1) * size] for i in range(ROLES)]
    states, params, gates, tokens, dims = (blocks[(turn + r) % ROLES] for r in range(ROLES))

    def learner(self, x):
        return (x @ getattr(self, states[0])) * getattr(self, params[0])

    def loss(self, k, v):
        """Of which native kernels, which take long to compile, have but one scan: its gradients are those of any W."""
        found = self.learner(k) - getattr(self, tokens[0])
        total = tttc.sum(found * v) if backend == "tvm" else 0.5 * tttc.sum((tttc.tanh(found) - v) ** 2)
        for w, p, token in zip(states[1:], params[1:], tokens[1:], strict=True):
            total = total + tttc.sum(getattr(self, w) * getattr(self, p) * getattr(self, token))
        return total

    def output(self, q):
        made = self.learner(q)
        for w in states[1:]:
            made = made + tttc.sum(getattr(self, w))
        return made

    declared = {n: tttc.token(dims[0]) for n in ("q", "k", "v")}
    for i, (w, p, token) in enumerate(zip(states, params, tokens, strict=True)):
        own_dims = (dims[0], dims[0]) if i == 0 else (dims[i],)
        declared |= {w: tttc.state(*own_dims), p: tttc.param(dims[i]), token: tttc.token(dims[i])}
    rates = {w: tttc.gate(g) for w, g in zip(states, gates, strict=True)}
    functions = {"learner": learner, "loss": loss, "output": output}
    settings = {"update": tttc.sgd(lr=rates), "mini_batch": 4}
    made = type(CLASSES[turn], (tttc.Variant,), {**declared, **functions, **settings})
    return made, {d: 2 + i % 2 for i, d in enumerate(dims)}


class Neighbours(tttc.Variant):
    """States that differ by what is derived from `W`, under a rule that derives everything."""

    mini_batch = 4
    bias = tttc.param("D")

    def learner(self, x):
        return x @ self.W + self.bias

    def loss(self, k, v):
        others = sum(tttc.sum((getattr(self, w) - v) ** 2) for w in PAIRS[1:])
        return 0.5 * tttc.sum((self.learner(k) - v) ** 2) + 0.5 * others

    def output(self, q):
        return self.learner(q) + sum((i + 1.0) * getattr(self, w) for i, w in enumerate(PAIRS[1:]))

    update = tttc.sgd(lr=tttc.gate("lr"), momentum=tttc.gate("S"), decay=tttc.gate("a"), read_scale=tttc.gate("tau"))


for _pair in PAIRS:
    setattr(Neighbours, _pair, tttc.state(*(("D", "D") if _pair == "W" else ("D",))))


class Compared(tttc.Variant):
    """A learner whose kernels are made quickly."""

    mini_batch = 4
    W = tttc.state("D", "D")

    def learner(self, x):
        return x @ self.W

    def loss(self, k, v):
        return 0.5 * tttc.sum((self.learner(k) - v) ** 2)

    update = tttc.sgd(lr=tttc.gate("lr"))


def called(name, **declared):
    """The quick learner under another name, with more declared."""
    return type(name, (Compared,), {"__module__": __name__, **declared})


def wrong(variant, dims, backend, tokens=6):
    """Outputs, states and gradients that are not those of the oracle."""
    dtype = torch.float32 if backend == "triton" else torch.float64
    layer = tttc.compile(variant, dims, dtype, backend=backend, chunk=4)
    exact = random_inputs(layer.signature, layer.dims, 1, tokens, 2)

    def to(x):
        return x.detach().to(dtype).requires_grad_()

    groups = {n: {k: to(x) for k, x in getattr(exact, n).items()} for n in ("gates", "params", "state", "tokens")}
    inputs = replace(exact, q=to(exact.q), k=to(exact.k), v=to(exact.v), **groups)
    z, state = layer(inputs.q, inputs.k, inputs.v, **keywords(inputs))
    found = result_of(z.double(), {n: x.double() for n, x in state.items()}, inputs)
    return differences(found, oracle_result(variant, exact), *ALLOWED[dtype])


# -- against the oracle ------------------------------------------------------------------------------------------------


def test_there_are_forty_names():
    assert len(set(NAMES)) == len(NAMES) == 40
    assert len(NAMES) % ROLES == 0


@pytest.mark.parametrize("turn", range(ROLES))
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_name_in_every_role(backend, turn):
    variant, dims = crowded(turn, backend)
    assert not tttc.check(variant)
    assert not wrong(variant, dims, backend)


@pytest.mark.parametrize("backend", [*BACKENDS[::2], pytest.param("tvm", marks=[tvm, pytest.mark.slow])])
def test_names_that_are_derived_from_another(backend):
    assert not wrong(Neighbours, {"D": 3}, backend)


class Memory(Compared):
    """Two matrices, of which a kernel has one in a buffer that is called as the other."""

    W_out = tttc.state("D", "D")

    def learner(self, x):
        return tttc.tanh(x @ self.W) @ self.W_out


@tvm
def test_native_buffers_are_those_of_their_states():
    assert not wrong(Memory, {"D": 4}, "tvm")


@pytest.mark.parametrize("name", CLASSES)
def test_every_name_of_a_class(name):
    """On PyTorch; its kernels of Triton are at least Python, with a function for each."""
    variant = called(name)
    assert not wrong(variant, {"D": 2}, "torch")
    layer = tttc.compile(variant, {"D": 2}, backend="torch")
    source = emit_triton(layer.stages.program)
    made = {x.name for x in ast.parse(source.text).body if isinstance(x, ast.FunctionDef)}
    assert {word for name, word in source.wording.called.items() if name.endswith("()")} <= made
    assert not any(map(keyword.iskeyword, made))
    ast.parse(str(layer.stages["adjoint"]))


@pytest.mark.parametrize("name", ["Lambda", "Exp"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_kernels_of_a_class_with_a_hard_name(backend, name):
    assert not wrong(called(name), {"D": 2}, backend)


@pytest.mark.parametrize("gate", ["W", "q", "lambda", "D"])
def test_a_gate_is_called_as_something_else(gate):
    assert not wrong(called("Named", update=tttc.sgd(lr=tttc.gate(gate))), {"D": 2}, "torch")


class OfTokens(tttc.Variant):
    """States, a param and gates that are called as what every declaration is given."""

    mini_batch = 4
    q = tttc.state("D", "D")
    k = tttc.state("D")
    v = tttc.param("D", init=1.0)

    def learner(self, x):
        return (x @ self.q) * self.v + self.k

    def loss(self, k, v):
        return 0.5 * tttc.sum((self.learner(k) - v) ** 2)

    update = tttc.sgd(lr={"q": tttc.gate("k"), "k": tttc.gate("q")}, momentum=0.5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_states_are_called_as_tokens(backend):
    assert not tttc.check(OfTokens)
    assert not wrong(OfTokens, {"D": 2}, backend)


def test_what_is_called_as_a_token_is_decoded_grouped_and_explained():
    """With a mini-batch left open, whose tokens and sums the state carries; q with heads of its own."""
    for decode in ("sums", "rows"):
        layer = tttc.compile(OfTokens, {"D": 2}, torch.float64, decode=decode)
        inputs = random_inputs(layer.signature, layer.dims, 1, 6, 2)
        whole, end = layer(inputs.q, inputs.k, inputs.v, **keywords(inputs))
        z, state = split_call(layer, inputs, (1, 3))
        assert max(relative_error(z, whole), *(relative_error(state[n], end[n]) for n in end)) <= 1e-12
        q = torch.randn(1, 6, 4, 2, dtype=torch.float64)
        grouped = layer(q, inputs.k, inputs.v, **keywords(inputs))[0]
        alone = layer(q[:, :, ::2], inputs.k, inputs.v, **keywords(inputs))[0]
        assert relative_error(grouped[:, :, ::2], alone) <= 1e-12
        assert "q[D, D], k[D]" in layer.explain()


class Weighted(Compared):
    """A gate that the loss reads, and that is called as the state."""

    weight = tttc.gate("W")

    def loss(self, k, v):
        return 0.5 * self.weight * tttc.sum((self.learner(k) - v) ** 2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gate_is_called_as_a_state(backend):
    assert not wrong(Weighted, {"D": 2}, backend)


def test_a_sequence_goes_on_with_a_gate_called_as_the_state():
    variant = called("Named", update=tttc.sgd(lr=tttc.gate("W")), mini_batch=3)
    layer = tttc.compile(variant, {"D": 2}, torch.float64, backend="torch")
    inputs = random_inputs(layer.signature, layer.dims, 1, 5, 1)
    whole, _ = layer(inputs.q, inputs.k, inputs.v, **keywords(inputs))
    parts, state = [], inputs.state
    for t in range(5):
        part = slice(t, t + 1)
        gates = {n: x[:, part] for n, x in inputs.gates.items()}
        z, state = layer(inputs.q[:, part], inputs.k[:, part], inputs.v[:, part], gates=gates, state=state)
        parts.append(z)
    torch.testing.assert_close(torch.cat(parts, 1), whole)


# -- what a user sees --------------------------------------------------------------------------------------------------


def test_states_are_found_by_their_names():
    variant, dims = crowded(0, "torch")
    layer = tttc.compile(variant, dims, backend="torch")
    inputs = random_inputs(layer.signature, layer.dims, 1, 5, 1)
    state = layer(*(x.float() for x in (inputs.q, inputs.k, inputs.v)), **_single(inputs))[1]
    assert set(state) == set(layer.signature.states) == {*NAMES[:8]}
    assert torch.equal(state.C, state["C"])


def _single(inputs):
    return {n: {k: x.float() for k, x in group.items()} for n, group in keywords(inputs).items()}


def test_explain_shows_the_names_of_the_declaration():
    variant, dims = crowded(0, "torch")
    text = tttc.compile(variant, dims, backend="torch").explain()
    assert all(f"{name}[" in text for name in NAMES[:8])
    assert "⟨" not in text
    assert "C_[" not in text.split("declare")[0]


def test_an_error_shows_the_name_of_the_declaration():
    layer = tttc.compile(called("Named", C=tttc.param("T")), {"D": 2, "T": 3}, backend="torch")
    x = torch.zeros(1, 2, 1, 2)
    with pytest.raises(ShapeError, match=r"C has shape \[2\]"):
        layer(x, x, x, gates={"lr": torch.zeros(1, 2, 1)}, params={"C": torch.zeros(2)})


@pytest.mark.parametrize("name", ["learner", "update", "read"])
def test_what_every_declaration_has_is_no_state(name):
    with pytest.raises(DeclarationError):
        tttc.compile(called("Named", **{name: tttc.state("D")}), {"D": 2}, backend="torch")


def test_a_state_may_be_called_as_a_function_of_the_class():
    assert not wrong(called("Named", bind=tttc.param("D"), replace=tttc.param()), {"D": 2}, "torch")


# -- how they are kept apart -------------------------------------------------------------------------------------------


def test_no_derived_name_can_be_declared():
    derived = [own("z"), prefixed("S", "W"), suffixed("W", "start"), prefixed("S", suffixed("W", "out"))]
    assert [spelled(n) for n in derived] == ["z", "S_W", "W_start", "S_W_out"]
    assert not any(map(is_declared, derived))
    assert prefixed("S", "start") != suffixed("S", "start")


def test_the_verifier_rejects_a_derived_variable_that_could_be_declared():
    program = tttc.compile(Compared, {"D": 2}, backend="torch").stages["schedule"].program
    verify(program)
    plain = _with_a_name_that_is_declared(program)
    with pytest.raises(MalformedProgram, match="is called as a user may call a variable"):
        verify(plain)


def _with_a_name_that_is_declared(program):
    from tttc.ir.expr import Expr, Leaf, leaves, substitute
    from tttc.ir.program import Assign, Block, Function

    function = program["compared_close"]
    sums = [p for p in function.params if p.role == "sum"]
    to = {p: Expr("leaf", (), (Leaf(spelled(p.name), "sum"), p.axes)) for p in sums}
    (block,) = function.body
    values = substitute([a.value for a in block.assigns], to)
    assert set(to) <= set(leaves(a.value for a in block.assigns))
    made = Block(tuple(Assign(a.target, v) for a, v in zip(block.assigns, values, strict=True)))
    params = tuple(to.get(p, p) for p in function.params)
    return replace(program, functions=(Function(function.name, params, (made,), function.returns),), scans=())


def test_a_word_is_unlike_what_the_text_says_beside():
    text = f"def f({marked('len')}, {marked(own('x'))}):\n    return len({marked('x')}) + {marked(own('x'))}\n"
    assert worded(text).text == "def f(len_, x_):\n    return len(x) + x_\n"


def test_there_is_no_list_of_words():
    """Of Python's, CUDA's or the compiler's own, that a declaration must not use."""
    found = set(keyword.kwlist) | set(dir(builtins)) | {"alignas", "blockIdx", "threadIdx", "n_tokens", "S_W"}
    for file in (f for folder in ("ir", "tttc", "backends") for f in Path(folder).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Tuple | ast.Set | ast.List):
                words = {x.value for x in node.elts if isinstance(x, ast.Constant) and isinstance(x.value, str)}
                assert len(words & found) < 4 or "Error" in str(words), (file, words)
            if isinstance(node, ast.Name):
                assert not node.id.endswith(("RESERVED", "RESERVED_NAMES", "DERIVED_NAMES")) or file.name == "target.py"


# -- modules -----------------------------------------------------------------------------------------------------------


class Taken(Compared):
    """What torch's own modules have as methods."""

    half = tttc.param("D")
    keys = tttc.state("D")
    type = tttc.token("D")

    def loss(self, k, v):
        return 0.5 * tttc.sum((self.learner(k) + self.half * self.keys - self.type - v) ** 2)

    update = tttc.sgd(lr=tttc.gate("items", scale=0.1))


def test_a_module_of_a_declaration_with_the_names_of_methods():
    torch.manual_seed(0)
    block = tttc.nn.TTT(Taken, 8, 2)
    block(torch.randn(1, 5, 8)).square().sum().backward()
    found = {*block.params, *block.initial_state, *block.gates, *block.token_proj}
    assert found == {"half", "W", "keys", "items", "type"}
    assert all(p.grad is not None for p in block.parameters())
    other = tttc.nn.TTT(Taken, 8, 2)
    other.load_state_dict(block.state_dict())
