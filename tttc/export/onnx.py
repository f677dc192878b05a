"""A compiled layer as an ONNX file: one graph for any number of sequences and tokens, its state in and out.

layer = tttc.compile(tttc.library.TTTLinear, {"D": 64})
tttc.export.onnx.save(layer, "ttt_linear.onnx")
session = tttc.export.onnx.Session("ttt_linear.onnx")
given = {"q": q, "k": k, "v": v, "lr": lr, "tau": tau, "gamma": gamma, "beta": beta}
z, state = session(given | {"past_W1": W1, "past_b1": b1})
z, state = session(given, state)                                 # the tokens that follow
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from tttc.compiler.driver import compile
from tttc.errors import ShapeError
from tttc.export.ports import Port
from tttc.export.runtime import RUNTIME, SEVERAL, TOLERANCE, ExportMismatch, package, runtime_session
from tttc.export.stream import Stream
from tttc.export.whole import save_model
from tttc.ir.program import ScanKind, TokenProgram
from tttc.ir.structure import digest
from tttc.runtime.flat_call import BEGINS, GIVEN
from tttc.runtime.layer import Layer
from tttc.verification.comparison import relative_error
from tttc.verification.inputs import Inputs, random_inputs
from tttc.version import __version__

__all__ = ["ExportMismatch", "Session", "model", "save", "save_model", "text"]
Arrays = dict[str, np.ndarray]
Linear = Literal["auto", "com.microsoft", "ai.onnx", "scan"]


def save(layer: Layer, path: str | Path, linear: Linear = "auto") -> Path:
    """Write the layer as an ONNX file, once it was seen to compute what the layer does.

    A rule that is one of LinearAttention's (linear, gated, delta, gated delta, whatever the variant is called) is that
    operator: of the domain "com.microsoft", for which ONNX Runtime has a kernel, or of "ai.onnx", which is ONNX's own
    from opset 27 on; with `linear="scan"`, and where it is none, it is a Scan over chunks.

    Inputs are the tokens [B, T, H, *dims], gates [B, T, H, ...], params [P, *dims] with P one or the heads, what the
    state carries, `past_...` [B, H, *dims], and `past_position` [1]: -1 where a sequence begins. Outputs are z
    [B, T, H, E] and the same state as `present_...`. All is float32. The metadata of the file says what it was made of.
    An open mini-batch is carried as its sums where one token has a scan of its own, unless the layer was compiled with
    decode="rows".

    Raises:
        BackendRefusal: the layer has no such graph yet, or none with the operator that was asked for; or onnx or
            onnxruntime is not installed.
        ExportMismatch: what ONNX Runtime computes is not what the layer does.
    """
    exported, path = model(layer, linear), Path(path)
    serialized = exported.SerializeToString()
    _compare(layer, Session(serialized))
    path.write_bytes(serialized)
    return path


def text(layer: Layer, linear: Linear = "auto") -> str:
    """The graph in ONNX's own language."""
    return _stream(_in(torch.float32, layer), linear).text()


def _stream(layer: Layer, linear: Linear) -> Stream:
    return Stream(layer.stages.program, layer.signature, layer.sequencing, linear)


def model(layer: Layer, linear: Linear = "auto") -> Any:
    """The graph as an `onnx.ModelProto`, checked; equal bytes for equal layers."""
    onnx = package("onnx")
    single = _in(torch.float32, layer)
    stream = _stream(single, linear)
    made = onnx.parser.parse_model(stream.text())
    about = {
        "tttc.version": __version__,
        "tttc.variant": single.signature.name,
        "tttc.declaration": single.stages["declare"].text,
        "tttc.digest": digest(single.stages.of(TokenProgram)),
        "tttc.onnxruntime": f">={RUNTIME}",
        "tttc.ports": json.dumps([_port(p, i.name) for p, i in zip(stream.ports, made.graph.input, strict=True)]),
    }
    onnx.helper.set_model_props(made, about)
    onnx.checker.check_model(made, full_check=True)
    return made


def _in(dtype: torch.dtype, layer: Layer) -> Layer:
    """The same layer in another dtype, in operations of PyTorch. An open mini-batch is carried as its sums where a
    token alone has a scan that adds to them, unless rows were asked for.
    """
    changed = {"dtype": dtype, "device": "cpu", "backend": "torch", "config": None, "telemetry": False}
    if layer.settings.decode == "auto" and layer.stages.program.scan(ScanKind.TOKEN) is not None:
        changed["decode"] = "sums"
    return compile(layer.signature.variant, **{**vars(layer.settings), **changed})


def _port(p: Port, name: str) -> dict[str, Any]:
    """What a caller has to know of an input; `length` is how many tokens it has where a sequence begins."""
    length = {"rows": [0], "taps": p.taps}.get(p.group, [])
    return {"name": name, "group": p.group, "length": length, "dims": list(p.dims), "begins": p.begins}


class Session:
    """An exported layer in ONNX Runtime, on as many threads as PyTorch has: a file, or its bytes. Arrays go in and out,
    the state from call to call.
    """

    def __init__(self, source: str | Path | bytes) -> None:
        self.session = runtime_session(source if isinstance(source, bytes) else str(source))
        self.ports = json.loads(self.session.get_modelmeta().custom_metadata_map["tttc.ports"])
        self.outputs = [o.name for o in self.session.get_outputs()]

    def __call__(
        self, given: Mapping[str, Any], state: Mapping[str, np.ndarray] | None = None
    ) -> tuple[np.ndarray, Arrays]:
        """z, and the state after the last token, for the arrays by the names of the inputs. Without a state a sequence
        begins; states that are given among the arrays are where it does.

        Raises `ShapeError` for names that are missing or unknown.
        """
        arrays = {n: np.ascontiguousarray(x, np.float32) for n, x in given.items()}
        first = next((p["name"] for p in self.ports if p["group"] == "token"), "q")
        if first not in arrays:
            raise ShapeError(f"`{first}` is missing.\n  It is [B, T, H, {', '.join(map(str, self.ports[0]['dims']))}].")
        batch, _, heads = arrays[first].shape[:3]
        fed = {**(self.begin(batch, heads) if state is None else state), **arrays}
        names = [p["name"] for p in self.ports]
        missing, unknown = [n for n in names if n not in fed], [n for n in fed if n not in names]
        if missing or unknown:
            said = [
                f"{', '.join(x)} {'is' if len(x) == 1 else 'are'} {what}"
                for x, what in ((missing, "missing"), (unknown, "no input"))
                if x
            ]
            raise ShapeError(f"{'; '.join(said)}.\n  The inputs are {', '.join(names)}.")
        z, *after = self.session.run(None, fed)
        carried = [p["name"] for p in self.ports if p["group"] not in GIVEN]
        return z, dict(zip(carried, after, strict=True))

    def begin(self, batch: int, heads: int) -> Arrays:
        """What a state carries before the first token; the weights themselves are given."""
        found: Arrays = {}
        for p in self.ports:
            if p["group"] == "position":
                found[p["name"]] = np.array([BEGINS])
            elif p["group"] not in (*GIVEN, "weights"):
                length = p["length"]
                found[p["name"]] = np.full([batch, heads, *length, *p["dims"]], p["begins"], np.float32)
        return found


def _compare(layer: Layer, session: Session) -> None:
    """Calls of several lengths against the layer in float64; raises `ExportMismatch`. Where float32 itself is far from
    that, as Titans is after some steps, the graph may be as well.
    """
    b, exact, single = layer.signature.mini_batch, _in(torch.float64, layer), _in(torch.float32, layer)
    weights = [p["name"] for p in session.ports if p["group"] == "weights"]
    for tokens in (b + 3 if isinstance(b, int) else 19, 1, 0):
        inputs = random_inputs(layer.signature, layer.dims, 2, tokens, 2, tokens)
        wanted, rounded = (_called(x, inputs) for x in (exact, single))
        z, after = session(arrays(layer, session, inputs))
        found = dict(zip(wanted, [z, *(after[n] for n in weights)], strict=True))
        for name, x in wanted.items():
            allowed = max(TOLERANCE, SEVERAL * relative_error(rounded[name], x))
            error = relative_error(torch.from_numpy(found[name]).double(), x)
            if not error <= allowed:
                differs = f"{name} of {tokens} tokens differs by {error:.1e} in ONNX Runtime, more than {allowed:.0e}"
                raise ExportMismatch(f"variant `{layer.signature.name}`: {differs}.\n  Nothing was written.")


@torch.no_grad()
def _called(layer: Layer, inputs: Inputs) -> dict[str, torch.Tensor]:
    """z and the weights, in float64."""
    given = inputs.map(lambda x: x.detach().to(layer.dtype))
    z, state = layer(given.q, given.k, given.v, **given.keywords())
    return {"z": z.double(), **{n: x.double() for n, x in state.items()}}


def arrays(layer: Layer, session: Session, inputs: Inputs) -> Arrays:
    """The inputs of a call by the names of the graph."""
    given = {
        "token": [inputs.q, inputs.k, inputs.v, *inputs.tokens.values()],
        "gate": list(inputs.gates.values()),
        "param": [
            x if x.dim() > len(s.dims) else x[None]
            for x, s in zip(inputs.params.values(), layer.signature.params.values(), strict=True)
        ],
        "weights": list(inputs.state.values()),
    }
    found: Arrays = {}
    for group, values in given.items():
        names = [p["name"] for p in session.ports if p["group"] == group]
        found |= {n: x.detach().float().numpy() for n, x in zip(names, values, strict=True)}
    return found
