"""`tttc.compile`: from a declaration to a layer."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import overload

import torch

from tttc.attention import AttentionLayer, NonParametric, compile_attention
from tttc.backends import torch as torch_backend
from tttc.backends import tvm as tvm_backend
from tttc.backends.interface import Backend
from tttc.compile import Entry, Options, run_pipeline
from tttc.declare import checked_signature
from tttc.errors import BackendRefusal, DeclarationError, ShapeError
from tttc.ir.program import Program
from tttc.layer import Layer
from tttc.variant import Signature, Variant

DTYPES = {torch.float64: "f64", torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
BACKENDS: dict[str, Backend] = {"torch": torch_backend, "tvm": tvm_backend}


@overload
def compile(
    variant: type[Variant],
    dims: Mapping[str, int],
    dtype: torch.dtype = ...,
    device: str | torch.device = ...,
    backend: str = ...,
    *,
    chunk: int | None = ...,
    checkpoint: int | str | None = ...,
    decode: str = ...,
    telemetry: bool = ...,
) -> Layer: ...


@overload
def compile(
    variant: type[NonParametric],
    dims: Mapping[str, int],
    dtype: torch.dtype = ...,
    device: str | torch.device = ...,
) -> AttentionLayer: ...


def compile(
    variant: type[Variant] | type[NonParametric],
    dims: Mapping[str, int],
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    backend: str = "auto",
    *,
    chunk: int | None = None,
    checkpoint: int | str | None = "auto",
    decode: str = "auto",
    telemetry: bool = False,
) -> Layer | AttentionLayer:
    """Compile a declaration into a layer.

    Args:
        variant: a subclass of `tttc.Variant`, or of `tttc.NonParametric`, which becomes attention.
        dims: the size of every dim that the declaration names, such as {"D": 64, "F": 256}.
        dtype: of q, k, v and z. States and arithmetic are float32, with float64 float64 all the way.
        device: where the tensors of a call are.
        backend: "torch", which runs everywhere; "tvm", native kernels for a CPU (pip install 'tttc[tvm]'), compiled
            when first called and kept on disk; or "auto", "tvm" where it can run the program, otherwise "torch".
        chunk: tokens per step where the mathematics leaves it free; never changes a result.
        checkpoint: chunks between two states kept for the backward, which recomputes the others; "auto" is about the
            square root of their number, None (or 0) keeps every value and recomputes nothing.
        decode: how a state carries a mini-batch that a call leaves open: the "sums" of what it added, as large as
            its weights; its "rows", the tokens, which run again with those that follow; "auto" takes what is smaller.
        telemetry: the state that a call returns also says what its inner loop did, mini-batch by mini-batch:
            `state.telemetry["loss_before"]` and `["loss_after"]` (summed over its tokens, at the weights that it
            began and ended with), `["gradient_norm"]` and `["update_norm"]` (over all states), each
            [B, H, mini-batches].

    Raises:
        DeclarationError: with every problem of the declaration.
        ShapeError: if a dim is missing or not positive.
        BackendRefusal: if the backend named cannot run the program.
    """
    if isinstance(variant, type) and issubclass(variant, NonParametric):
        return compile_attention(variant, dims, dtype, device)
    declared = checked_signature(variant)
    sizes = _checked_dims(declared, dims)
    if dtype not in DTYPES:
        raise DeclarationError(f"dtype {dtype} is not supported; use one of {', '.join(map(str, DTYPES))}")
    if backend not in ("auto", *BACKENDS):
        raise _refused(backend, [f"there is no such backend in this version; there are auto, {', '.join(BACKENDS)}"])
    if chunk is not None and (not _is_int(chunk) or chunk < 1):
        raise ShapeError(f"chunk is {chunk!r}; it must be a positive int")
    if not (checkpoint in (None, "auto") or (_is_int(checkpoint) and int(checkpoint) >= 0)):
        raise ShapeError(f'checkpoint is {checkpoint!r}; it must be "auto", None or a number of chunks')
    if decode not in ("auto", "sums", "rows"):
        raise ShapeError(f'decode is {decode!r}; it must be "auto", "sums" or "rows"')
    stages = run_pipeline(declared, Options(sizes, "f64" if dtype == torch.float64 else "f32", chunk, telemetry))
    began = time.perf_counter()
    taken, why = _taken(backend, stages.program, torch.device(device))
    chosen: Backend = BACKENDS[taken]
    source = chosen.emit(stages.program)
    scans = chosen.load(source, stages.program)
    milliseconds = (time.perf_counter() - began) * 1e3
    stages.entries.append(Entry("emit", len(stages) + 1, len(stages) + 1, None, milliseconds, source.text))
    return Layer(
        declared,
        stages,
        scans,
        source.text,
        dims=sizes,
        dtype=dtype,
        device=torch.device(device),
        backend=taken,
        why=why,
        checkpoint=checkpoint,
        decode=decode,
    )


def _taken(backend: str, program: Program, device: torch.device) -> tuple[str, str]:
    """The backend that runs a program, and why it is that one.

    "auto" is what the environment variable TTTC_BACKEND names, else native kernels where they can be had, else torch.
    """
    named = os.environ.get("TTTC_BACKEND", "auto") if backend == "auto" else backend
    if named != "auto" and named not in BACKENDS:
        raise _refused(named, [f"TTTC_BACKEND names no backend; there are auto, {', '.join(BACKENDS)}"])
    if named != "auto":
        reasons = [*BACKENDS[named].refusals(program), *_misplaced(named, device)]
        if reasons:
            raise _refused(named, reasons)
        return named, f"{named}: asked for by name" if backend != "auto" else f"{named}: TTTC_BACKEND asks for it"
    reasons = [*_misplaced("tvm", device), *BACKENDS["tvm"].refusals(program)]
    if reasons:
        return "torch", f"torch: runs every program; not tvm: {reasons[0]}"
    return "tvm", "tvm: native kernels for this CPU"


def _misplaced(backend: str, device: torch.device) -> list[str]:
    """Why a backend cannot run on the device."""
    return [f"it runs on a CPU, not on {device}"] if backend == "tvm" and device.type != "cpu" else []


def _refused(backend: str, reasons: list[str]) -> BackendRefusal:
    """The error of a backend that was asked for by name."""
    listed = "\n".join(f"  - {r}" for r in reasons)
    return BackendRefusal(f'backend {backend!r} cannot run this program:\n{listed}\n  Use backend="torch" or "auto".')


def _checked_dims(declared: Signature, dims: Mapping[str, int]) -> dict[str, int]:
    missing = [d for d in declared.dims if d not in dims]
    if missing:
        users = {
            d: [n for n, s in (declared.tokens | declared.states | declared.params).items() if d in s.dims]
            for d in missing
        }
        said = "; ".join(f"{d} (an axis of {', '.join(names)})" for d, names in users.items())
        example = ", ".join(f'"{d}": 64' for d in declared.dims)
        raise ShapeError(f"variant `{declared.name}`: no size is given for {said}.\n  Pass dims={{{example}}}.")
    bad = {d: n for d, n in dims.items() if not _is_int(n) or n < 1}
    if bad:
        said = ", ".join(f"{d}={n!r}" for d, n in bad.items())
        raise ShapeError(f"variant `{declared.name}`: {said}.\n  Every dim is a positive int.")
    return {d: dims[d] for d in declared.dims}


def _is_int(x: object) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)
