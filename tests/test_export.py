"""Layers as files: what ONNX Runtime computes from call to call is what the definition does."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import tttc
from tests.backends.test_onnx import SHORT, TOLERANCE, VARIANTS, WORSE
from tests.helpers import Result, differences, dims_of, inputs_for, oracle_result, run_alone
from tests.learners import OneByOne, Renewed
from tttc.backends.onnx.form import node_count
from tttc.cli.main import app
from tttc.errors import BackendRefusal, ShapeError
from tttc.export import onnx as export

onnx = pytest.importorskip("onnx", reason="onnx is an extra: pip install 'tttc[onnx]'")
pytest.importorskip("onnxruntime", reason="onnxruntime is an extra: pip install 'tttc[onnx]'")

TOKENS = 13
RESIDENT = Path("/proc/self/statm")
CUTS = ((), (1, 2, 6, 6), tuple(range(1, TOKENS)))  # as one call, with one of no tokens, and token by token
OFF = {
    **WORSE,
    "Titans": 1e-3,
    "Tiled": 1e-3,
}  # from token to token it magnifies what float32 rounds: PyTorch's float32 is as far off


class Windowed(tttc.Variant):
    """A token of which the last three are seen, a rule that carries an average, and a name that is none of ASCII."""

    mini_batch = 4
    W = tttc.state("D", "D", init=tttc.normal(0.5))
    k = tttc.token("D", window="K")
    q = tttc.token("D", window="K")
    été = tttc.param("K", init=1.0)

    def learner(self, x):
        return tttc.mean(x, axis=0) @ self.W

    def loss(self, k, v):
        return 0.1 * tttc.sum((self.learner(k) - v) ** 2) + 0.01 * tttc.sum(self.été) * tttc.sum(self.W * self.W)

    update = tttc.sgd(lr=tttc.gate("lr"), average=tttc.gate("rho"))


class Tiled(tttc.library.Titans):
    """Mini-batches of several chunks, memory and decay."""

    mini_batch = 6


class AsRows(tttc.library.TTTLinear):
    """An open mini-batch carried as its tokens, which an export takes where it is asked to."""


LAYERS = {**VARIANTS, **{v.__name__: v for v in (Windowed, OneByOne, Renewed, Tiled, AsRows)}}
CHUNKS = {"OneByOne": 3, "Tiled": 4}


def compiled(name):
    variant = LAYERS[name]
    long = isinstance(variant.mini_batch, int) and variant.mini_batch > SHORT and name not in CHUNKS
    variant = variant.replace(mini_batch=SHORT) if long else variant
    decode = "rows" if name == "AsRows" else "auto"
    given = {"backend": "torch", "chunk": CHUNKS.get(name), "decode": decode}
    return tttc.compile(variant, dims_of(variant, 3, 5) | {"K": 3}, torch.float32, **given)


def in_calls(session, arrays, cuts):
    """z and the state of the same tokens in several calls."""
    groups = {p["name"]: p["group"] for p in session.ports}
    state, found = None, []
    for now, stop in zip((0, *cuts), (*cuts, TOKENS), strict=True):
        part = {n: x[:, now:stop] if groups[n] in ("token", "gate") else x for n, x in arrays.items()}
        z, state = session({n: x for n, x in part.items() if state is None or groups[n] != "weights"}, state)
        found.append(z)
    return np.concatenate(found, 1), state


@pytest.mark.parametrize("name", LAYERS)
def test_a_saved_layer_goes_on_where_it_stopped(name, tmp_path):
    layer, allowed = compiled(name), OFF.get(name, TOLERANCE)
    session = export.Session(export.save(layer, tmp_path / "layer.onnx"))
    inputs = inputs_for(layer, TOKENS, batch=2, heads=2)
    wanted = oracle_result(layer.signature.variant, inputs)._replace(gradients={})
    weights = [p["name"] for p in session.ports if p["group"] == "weights"]
    for cuts in CUTS[: 1 if layer.signature.read == "end" else None]:
        z, state = in_calls(session, export.arrays(layer, session, inputs), cuts)
        final = dict(zip(wanted.final, (torch.from_numpy(state[n]).double() for n in weights), strict=True))
        assert differences(Result(torch.from_numpy(z).double(), final, {}), wanted, allowed, allowed) == ""


@pytest.mark.parametrize("tokens", [1, 5])
def test_where_a_sequence_begins_nothing_is_read_of_a_mini_batch_before_it(tokens):
    """By the scan of one token and by the others: what such a state carries for an open mini-batch may be anything."""
    layer = compiled("TTTLinear")
    session = export.Session(export.model(layer).SerializeToString())
    inputs = inputs_for(layer, tokens, batch=2, heads=2)
    given = export.arrays(layer, session, inputs)
    opened = {p["name"] for p in session.ports if p["group"] in ("start", "summed")}
    assert opened == {"past_W1_start", "past_b1_start", "past_S_W1", "past_S_b1"}
    poisoned = {n: np.full_like(x, np.nan) if n in opened else x for n, x in session.begin(2, 2).items()}
    z, state = session(given)
    again, after = session({n: x for n, x in given.items() if n not in poisoned}, poisoned)
    np.testing.assert_array_equal(again, z)
    for name, x in state.items():
        np.testing.assert_array_equal(after[name], x)


def test_equal_layers_are_equal_files(tmp_path):
    first, second = (export.save(compiled("TTTLinear"), tmp_path / f"{i}.onnx").read_bytes() for i in "ab")
    assert first == second
    about = {p.key: p.value for p in onnx.load_from_string(first).metadata_props}
    assert about["tttc.variant"] == "TTTLinear"
    assert about["tttc.onnxruntime"] == ">=1.32"
    assert "def loss" in about["tttc.declaration"]


@pytest.mark.skipif(not RESIDENT.exists(), reason="memory is read from /proc")
def test_decoding_takes_no_more_memory_the_longer_it_goes(tmp_path):
    """Neither the state nor the runtime: a thousand single tokens, of which the first are for what is kept for good."""
    layer = tttc.compile(tttc.library.TTTLinear, {"D": 32}, torch.float32, backend="torch", decode="rows")
    session = export.Session(export.save(layer, tmp_path / "layer.onnx"))
    given = export.arrays(layer, session, inputs_for(layer, 1, batch=2, heads=4))
    _, state = session(given)
    given = {n: x for n, x in given.items() if not n.startswith("past_")}
    pages, held = [], []
    for _ in range(1000):
        _, state = session(given, state)
        pages.append(int(RESIDENT.read_text().split()[1]))
        held.append(sum(x.nbytes for x in state.values()))
    assert len(set(held)) == 16
    assert held[992 - 16 : 992] == held[:16]
    assert (pages[-1] - pages[300]) * resource.getpagesize() < 2**21


def test_the_graph_of_a_layer(golden):
    for name, variant in (("ttt_linear", tttc.library.TTTLinear), ("gated_delta_net", tttc.library.GatedDeltaNet)):
        golden(f"onnx/{name}_stream", export.text(tttc.compile(variant, {"D": 64}, backend="torch")))


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("TTTLinear", r"a Scan over chunks of 4 tokens, \d+ nodes each"),
        ("DeltaNet", r"one LinearAttention node, \d+ around it"),
        ("OneByOne", r"a Scan over chunks of 3 tokens, \d+ nodes each"),
        ("Tiled", r"a Scan over mini-batches of 6 tokens, \d+ nodes each"),
    ],
)
def test_its_form_and_nodes_are_said(name, form):
    """Nodes are counted in the text: as many as the model has."""
    layer = compiled(name)
    assert re.search(f"^# onnx +{form}$", layer.explain(stages=()), re.MULTILINE)
    text = export.text(layer)
    model = onnx.parser.parse_model(text)
    assert node_count([text]) == sum(1 for part in (model.graph, *model.functions) for _ in every_node(part))


def every_node(function):
    """The nodes of a function, and of the graphs inside of them."""
    for node in function.node:
        yield node
        for attribute in node.attribute:
            yield from every_node(attribute.g)


def test_a_file_runs_without_tttc(tmp_path):
    path = export.save(compiled("DeltaNet"), tmp_path / "layer.onnx")
    script = (
        "import sys, numpy as np, onnxruntime\n"
        f"session = onnxruntime.InferenceSession({str(path)!r}, providers=['CPUExecutionProvider'])\n"
        "shapes = {'B': 1, 'T': 5, 'H': 2}\n"
        "given = {i.name: np.full([shapes.get(n, n) for n in i.shape], 0.1, np.float32)\n"
        "         for i in session.get_inputs() if i.type == 'tensor(float)'}\n"
        "z, *state = session.run(None, given | {'past_position': np.array([-1])})\n"
        "assert z.shape == (1, 5, 2, 3) and np.isfinite(z).all() and 'tttc' not in sys.modules\n"
    )
    run_alone(script)


def test_a_wrong_graph_is_not_written(tmp_path, monkeypatch):
    lowering = sys.modules["tttc.backends.onnx.lowering"]
    monkeypatch.setitem(lowering.ROWS, "sub", "Add")
    with pytest.raises(export.ExportMismatch, match=r"TTTLinear.*differs by .* in ONNX Runtime"):
        export.save(compiled("TTTLinear"), tmp_path / "layer.onnx")
    assert not list(tmp_path.iterdir())


def test_names_that_are_missing_or_unknown_are_said(tmp_path):
    session = export.Session(export.save(compiled("TTTLinear"), tmp_path / "layer.onnx"))
    q = np.zeros((1, 2, 1, 3), np.float32)
    with pytest.raises(ShapeError, match=r"^k, v, lr, .*past_b1 are missing; eta is no input"):
        session({"q": q, "eta": q})
    with pytest.raises(ShapeError, match="`q` is missing"):
        session({})


def test_a_package_that_is_absent_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(BackendRefusal, match=r"onnx is not installed.*\n  pip install 'tttc\[onnx\]'"):
        export.model(compiled("GLA"))


def test_the_command(tmp_path):
    path = tmp_path / "gla.onnx"
    done = CliRunner().invoke(app, ["export", "gla", "--dim", "D=4", "-o", str(path)])
    assert done.exit_code == 0, done.output
    assert path.stat().st_size < 20_000
