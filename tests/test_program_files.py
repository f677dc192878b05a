"""Declarations as data: read again they are the same, and a file that says anything else is refused with the reason."""

from __future__ import annotations

import copy
import io
import json
import pickle
import re
import zipfile

import pytest
import sympy
import torch

import tttc
from tests.helpers import dims_of, run_alone
from tests.learners import LEARNERS
from tttc import library
from tttc.errors import DeclarationError, FileRefused
from tttc.export.program_file import compiled, read, written
from tttc.ir.program import TokenProgram
from tttc.ir.structure import written as as_text

a = sympy.Symbol("a")
bent = tttc.elementwise(
    sympy.Piecewise((sympy.pi * a**3 / 7, a > 0.1), (sympy.sqrt(2) * sympy.sinh(a) + 2**a * sympy.erf(abs(a)), True))
)


class Bent(library.TTTLinear):
    """A formula of the user's own, with every kind of part."""

    def learner(self, x):
        return super().learner(bent(x))


DECLARED = {v.__name__: v for v in (library.LaCT, library.Moneta, library.Titans, library.KDA, library.MTTT, Bent)}
DECLARED |= {"CausalConvolution": LEARNERS["CausalConvolution"]}


def layer_of(name):
    variant = DECLARED[name]
    return tttc.compile(variant, dims_of(variant, 3, 5) | {"K": 2}, torch.float32, backend="torch")


@pytest.mark.parametrize("name", DECLARED)
def test_a_program_that_is_read_is_the_one_that_was_written(name):
    layer = layer_of(name)
    found, wanted = read(written(layer)).program, layer.stages.of(TokenProgram)
    one, two = (as_text((p.functions, p.update, p.dims, p.dtype, p.name, p.title)) for p in (found, wanted))
    assert one == two
    assert str(found) == str(wanted)


def test_a_program_makes_the_same_layer_but_not_its_class():
    layer = layer_of("Bent")
    again = compiled(read(written(layer)))
    assert again.source == layer.source
    assert again.digest == layer.digest
    assert written(again) == written(layer)
    with pytest.raises(DeclarationError, match=r"`Bent` was read from a file, which has no initial values"):
        again.init_state()
    with pytest.raises(DeclarationError, match=r"`Bent` was read from a file, which has its program and not its class"):
        tttc.verify(again.signature.variant)


# -- programs that are none --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text():
    return written(layer_of("Bent"))


def at(*path):
    """A change of what stands at a place."""

    def changed(to):
        def change(x):
            *way, last = path
            for step in way:
                x = x[step]
            x[last] = to(x[last]) if callable(to) else to

        return change

    return changed


def node(op, to, part=None):
    """A change of the first node of an operation: of its name, operands or argument."""

    def change(x):
        place = next(i for i, line in enumerate(x["nodes"]) if line[0] == op)
        if part is None:
            x["nodes"][place] = to
        else:
            x["nodes"][place][part] = to

    return change


def formula(to):
    def change(x):
        line = next(line for line in x["nodes"] if line[0] == "map")
        to(line[2])

    return change


def bomb(x):
    """Nodes that stand for ever larger formulas, of which each is small."""
    x["parts"] += [["mul", i + len(x["parts"]) - 1, i + len(x["parts"]) - 1] for i in range(60)]


def tower(x):
    x["parts"] += [["ratio", 9, 1], ["ratio", 10**9, 1], ["power", len(x["parts"]), len(x["parts"]) + 1]]


DAMAGED = {
    "another format": (at("format")("other"), "its format is 'other'"),
    "a later version": (at("version")(2), "its version is 2, this one reads 1"),
    "a part that is missing": (lambda x: x.pop("update"), "lacks update"),
    "a part that is unknown": (at("code")("print()"), "has 'code', which is unknown"),
    "another digest": (at("digest")("0" * 64), "its digest is '000"),
    "a number of the rule changed": (at("update", "clip")(1.5), "its digest is"),
    "a name with a line in it": (at("name")("x\nimport os"), "the name is .* no name"),
    "a title that is no name": (at("title")("a b"), "the title is 'a b', no name"),
    "a dim of no size": (at("dims", "D")(0), "dim D is 0"),
    "a dim that is a float": (at("dims", "D")(3.0), "dim D is 3.0, no integer"),
    "a dim that is true": (at("dims", "D")(True), "dim D is True, no integer"),
    "a dim of any size": (at("dims", "D")(10**20), "dim D is 1000.*, no integer"),
    "another dtype": (at("dtype")("f16"), "the dtype is 'f16'; it is one of f32, f64"),
    "a dtype unlike its settings": (at("settings", "dtype")("float64"), "its settings are of float64"),
    "telemetry that is a number": (at("telemetry")(1), "telemetry is 1, not true or false"),
    "nodes that are no list": (at("nodes")({}), "nodes is {}, no list"),
    "too many nodes": (at("nodes")(lambda n: n * 2000), "nodes, more than 20000"),
    "a node of two parts": (node("add", ["add", [0, 1]]), r"node \d+ is .*, no list of 3"),
    "an operation that is none": (node("add", "eval", 0), "'eval', which is no operation on one token"),
    "an operation along tokens": (node("contract", ["cumprod", [0], None]), "'cumprod', which is no operation"),
    "an operand that comes later": (node("add", [10_000, 0], 1), r"an operand, is 10000, no integer from 0 to"),
    "an operand before the first": (node("add", [-1, 0], 1), "an operand, is -1, no integer"),
    "too few operands": (node("add", [0], 1), "add, has 1 operands, it takes 2"),
    "no operands of a contraction": (node("contract", [], 1), "contract, has 0 operands"),
    "an argument where there is none": (node("add", 1, 2), "add, has the argument 1, and takes none"),
    "an axis that is no pair": (node("contract", [["D"]], 2), r"contract, is \['D'\], no list of 2"),
    "an axis that no operand has": (node("contract", [["F", "D"]], 2), "contract, has no type"),
    "an axis twice": (node("contract", [["D", "D"], ["D", "D"]], 2), "has an axis twice"),
    "an axis of no dim": (node("leaf", ["z", "token", [["D", "G"]]], 2), "have the sizes G, which are no dims"),
    "a leaf of another role": (node("leaf", ["q", "saved", []], 2), "the role of a leaf is 'saved'"),
    "a leaf with code for a name": (node("leaf", ["q; x", "token", []], 2), "'q; x', no name of a variable"),
    "an eps that is text": (node("layer_norm", [["D:1", "D"], "1"], 2), "layer_norm, is '1', no finite number"),
    "a formula by another name": (formula(lambda f: f.update(name="f_000000")), "its formula is called 'f_000000'"),
    "a formula of code": (formula(lambda f: f["parts"].append(["__import__", 0])), r"is \['__import__', 0\]"),
    "a formula without end": (formula(bomb), "larger than any formula"),
    "a power of powers": (formula(tower), "a power of a number that no formula has"),
    "a fraction of nothing": (formula(lambda f: f["parts"].append(["ratio", 1, 0])), "is 0, no integer from 1"),
    "a function that is missing": (lambda x: x["functions"].pop("output"), "functions lacks output"),
    "a parameter that is none": (at("functions", "loss", "params", 0)(lambda p: -5), "is -5, no integer"),
    "a loss of another shape": (
        lambda x: x["functions"]["loss"].update(value=x["functions"]["loss"]["params"][0]),
        "loss has axes",
    ),
    "a parameter that is not given": (at("functions", "output", "params")([]), "is read before it is defined"),
    "a rate of no state": (at("update", "momentum", "W9")(0), "momentum is of .*'W9'"),
    "a state without a rate": (lambda x: x["update"]["lr"].clear(), "update.lr is not there for every state"),
    "an order that is none": (at("update", "read")("later"), "update.read is 'later'"),
    "a mini-batch of none": (at("update", "mini_batch")(0), "update.mini_batch is 0"),
    "no steps": (at("update", "steps")(0), "update.steps is 0"),
    "a stage with lines for a label": (
        at("update", "at_end")([{"on": "update", "label": "a\nb", "values": {}, "begins": {}, "kept": {}}]),
        "the label of a stage is",
    ),
    "tokens without k": (lambda x: x["declared"]["tokens"].pop("k"), "its first tokens are not q, k and v"),
    "a token of other dims": (at("declared", "tokens", "q", 0)([]), r"reads the token q \[D\], which is not declared"),
    "a state that is not declared": (lambda x: x["declared"]["states"].pop("W1"), "the state W1 .* not declared so"),
    "a chunk of text": (at("settings", "chunk")("16"), "settings.chunk is '16'"),
    "a checkpoint that is none": (at("settings", "checkpoint")(-1), "settings.checkpoint is -1"),
    "a device that is none": (at("settings", "device")("tpu"), "settings.device is 'tpu'"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_what_is_no_program_is_refused(kind, text):
    change, reason = DAMAGED[kind]
    given = copy.deepcopy(json.loads(text))
    change(given)
    with pytest.raises(FileRefused, match=f"(?s)the file is no program of a layer: .*{reason}"):
        read(json.dumps(given))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda x: x[:-1], "no program of a layer: Expecting"),
        (lambda x: x.replace('"clip":null', '"clip":NaN'), "it has the number NaN"),
        (lambda x: x.replace('"clip":null', '"clip":1e999'), "update.clip is inf"),
        (lambda x: x.replace('"clip":null', '"clip":null,"clip":1'), "a name stands twice"),
        (lambda x: "[" * 100_000, "no program of a layer: it is nested too deeply"),
        (lambda x: "[]", "the file is .*, no object"),
        (lambda x: " " * 16_000_001, "has 16000001 characters"),
    ],
)
def test_what_is_no_text_of_one_is_refused(change, reason, text):
    with pytest.raises(FileRefused, match=reason):
        read(change(text))


# -- modules with their programs ---------------------------------------------------------------------------------------


class Model(torch.nn.Module):
    """Two layers, one of them of an invented learner, and what stands around them."""

    def __init__(self):
        super().__init__()
        self.first = tttc.nn.TTT(library.TTTLinear, 8, 2, backend="torch")
        self.second = tttc.nn.TTT(LEARNERS["LowRank"], 8, 2, dims={"R": 2}, rope=False, backend="torch")

    def forward(self, x):
        x = x + self.first(x)
        return x + self.second(x)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    model = Model()
    return model, tttc.export.save(model, tmp_path_factory.mktemp("saved") / "model.pt2", (torch.randn(1, 4, 8),))


def trained(model, given):
    """The outputs for some inputs, each followed by a step of training."""
    step = torch.optim.SGD(model.parameters(), lr=0.1)
    found = []
    for x in given:
        y = model(x)
        y.square().mean().backward()
        step.step()
        step.zero_grad()
        found.append(y.detach())
    return found


def test_a_process_without_the_declarations_runs_and_trains_a_module(saved, tmp_path):
    model, path = saved
    given = [torch.randn(batch, tokens, 8) for batch, tokens in ((1, 1), (2, 15), (1, 16), (3, 17), (2, 50))]
    torch.save((given, trained(copy.deepcopy(model), given)), tmp_path / "calls")
    run_alone(
        "import sys, torch, tttc\n"
        f"model = tttc.export.load({str(path)!r})\n"
        f"given, wanted = torch.load({str(tmp_path / 'calls')!r})\n"
        "step = torch.optim.SGD(model.parameters(), lr=0.1)\n"
        "for x, y in zip(given, wanted, strict=True):\n"
        "    z = model(x)\n"
        "    torch.testing.assert_close(z, y, rtol=1e-5, atol=1e-6)\n"
        "    z.square().mean().backward()\n"
        "    step.step()\n"
        "    step.zero_grad()\n"
        "assert not [n for n in sys.modules if n.startswith('tests')]\n"
    )


class Ran:
    """Says that it was unpickled."""

    happened = False

    def __reduce__(self):
        return setattr, (Ran, "happened", True)


def pickled():
    made = io.BytesIO()
    torch.save(((Ran(),), {}), made)
    return made.getvalue()


def rewritten(path, to, change, **settings):
    """The file again, after a change of what it holds, by name."""
    with zipfile.ZipFile(path) as old:
        files = {i.filename.partition("/")[2]: old.read(i) for i in old.infolist()}
    change(files)
    with zipfile.ZipFile(to, "w", **settings) as new:
        for name, content in files.items():
            new.writestr(f"model/{name}", content)
    return to


def replaced(name, old, new):
    def change(files):
        assert re.search(old, files[name].decode())
        files[name] = re.sub(old, new, files[name].decode(), count=1).encode()

    return change


def program(change):
    """A change of one of the programs."""

    def changed(files):
        programs = json.loads(files["extra/tttc.json"])
        name = next(iter(programs))
        programs[name] = change(programs[name])
        files["extra/tttc.json"] = json.dumps(programs).encode()

    return changed


GRAPH, WEIGHTS = "models/model.json", "data/weights/model_weights_config.json"
REFUSED = {
    "no programs": (lambda f: f.pop("extra/tttc.json"), "it lacks extra/tttc.json"),
    "programs that are no JSON": (lambda f: f.update({"extra/tttc.json": b"{"}), "tttc.json is no JSON"),
    "programs of other operators": (replaced("extra/tttc.json", "low_rank_", "high_rank_"), "it has programs of"),
    "a damaged program": (program(lambda x: x.replace('"steps":1', '"steps":9')), "its digest is"),
    "the program of another": (program(lambda x: written(layer_of("KDA"))), "is the operator of another program"),
    "a pickled weight": (replaced(WEIGHTS, '"use_pickle": false', '"use_pickle": true'), "is no plain tensor"),
    "a weight from elsewhere": (replaced(WEIGHTS, '"weight_0"', '"../weight_0"'), "is no plain tensor"),
    "an object among the constants": (
        lambda f: f.update({"data/constants/custom_obj_0": pickle.dumps(Ran())}),
        "custom_obj_0', which no such file has",
    ),
    "a pickle among the examples": (
        lambda f: f.update({"data/sample_inputs/model.pt": pickled()}),
        "its example holds more than tensors",
    ),
    "a graph that calls what it likes": (
        replaced(GRAPH, r"torch\.ops\.aten\.linear\.default", "torch.hub.load"),
        "its graph calls 'torch.hub.load'",
    ),
    "a size that is code": (replaced(GRAPH, r"Mul\(Integer\(8\)", "exit(Integer(8)"), "its graph has a size"),
    "a graph that is no JSON": (lambda f: f.update({GRAPH: b"[" * 100_000}), "nested too deeply"),
    "a graph of another kind": (replaced(GRAPH, '"graph_module"', '"module"'), "torch does not read it"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_file_that_is_not_ours_is_refused_and_nothing_of_it_runs(kind, saved, tmp_path):
    change, reason = REFUSED[kind]
    path = rewritten(saved[1], tmp_path / "model.pt2", change)
    with pytest.raises(FileRefused, match=f"(?s){reason}"):
        tttc.export.load(path)
    assert not Ran.happened


def test_a_file_that_is_damaged_is_refused(saved, tmp_path):
    path, content = tmp_path / "model.pt2", saved[1].read_bytes()
    for wrong in (b"", content[:-100], content[: len(content) // 2], b"PK" + content[100:]):
        path.write_bytes(wrong)
        with pytest.raises(FileRefused, match=r"^model.pt2 is (no \.pt2 file, or not all of one|refused)"):
            tttc.export.load(path)
    rewritten(saved[1], path, lambda files: None, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(FileRefused, match="which no such file has"):
        tttc.export.load(path)
    rewritten(saved[1], path, lambda files: None)
    assert isinstance(tttc.export.load(path), torch.nn.Module)
