"""`tttc.compile`: from a declaration to a layer."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any, overload

import torch

from tttc.attention import AttentionLayer, NonParametric, compile_attention
from tttc.backends import torch as torch_backend
from tttc.backends import triton as triton_backend
from tttc.backends import tvm_cpu as tvm_backend
from tttc.backends.interface import Backend
from tttc.backends.tvm_cuda.load import CudaBackend, unavailable
from tttc.compiler.fallback import warn_of_fallback
from tttc.compiler.pipeline import Entry, Options, run_pipeline
from tttc.declare.checks import checked_signature
from tttc.declare.number import whole
from tttc.declare.pickling import PickledVariant
from tttc.declare.variant import Signature, Variant
from tttc.errors import BackendRefusal, DeclarationError, ShapeError
from tttc.ir.program import Program
from tttc.runtime.layer import Layer
from tttc.runtime.standby import with_standby
from tttc.tuning.lookup import Lookup

DTYPES = {torch.float64: "f64", torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
BACKENDS: dict[str, Backend] = {"torch": torch_backend, "tvm": tvm_backend, "triton": triton_backend}
REASONS = {
    "torch": "runs every program, on any device",
    "tvm": "native kernels for this CPU",
    "triton": "fused kernels for this GPU",
}


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
    config: Mapping[str, int] | None = ...,
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
    config: Mapping[str, int] | None = None,
    decode: str = "auto",
    telemetry: bool = False,
) -> Layer | AttentionLayer:
    """Compile a declaration into a layer.

    Args:
        variant: a subclass of `tttc.Variant`, or of `tttc.NonParametric`, which becomes attention.
        dims: the size of every dim that the declaration names, such as {"D": 64, "F": 256}.
        dtype: of q, k, v and z. States and arithmetic are float32, with float64 float64 all the way.
        device: where the tensors of a call are.
        backend: "torch", which runs everywhere; "tvm", native kernels for a CPU or an NVIDIA GPU (pip install
            'tttc[tvm]'), compiled when first called and kept on disk; "triton", fused kernels for a GPU; or "auto":
            "tvm" on a CPU and "triton" on a GPU where they can run the program, if need be at another chunk, otherwise
            "torch".
        chunk: tokens per step where the mathematics leaves it free; never changes a result.
        checkpoint: chunks between two states kept for the backward, which recomputes the others; "auto" is about the
            square root of their number, None (or 0) keeps every value and recomputes nothing.
        config: how the backend makes its kernels, such as {"tile_rows": 4}; never changes a result. Chunk, checkpoint
            and config that are not given are what `tttc tune` found, on this device and for these dims or near them, or
            for a GPU what it estimated for its architecture; `layer.tuning` says what that was.
        decode: how a state carries a mini-batch that a call leaves open: the "sums" of what it added, as large as
            its weights; its "rows", the tokens, which run again with those that follow; "auto" takes what is smaller.
        telemetry: the state that a call returns also says what its inner loop did, mini-batch by mini-batch:
            `state.telemetry["loss_before"]` and `["loss_after"]` (summed over its tokens, at the weights that it
            began and ended with), `["gradient_norm"]` and `["update_norm"]` (over all states), each
            [B, H, mini-batches].

    Warns:
        FallbackWarning: once for each declaration, of a native backend that "auto" did not take, and why.

    Raises:
        DeclarationError: with every problem of the declaration.
        ShapeError: if a dim is missing or not positive.
        BackendRefusal: if the backend named cannot run the program.
    """
    if not isinstance(dims, Mapping):
        raise ShapeError(f'dims is {dims!r}; it must be a dict of sizes, such as {{"D": 64}}')
    if isinstance(variant, type) and issubclass(variant, NonParametric):
        return compile_attention(variant, dims, dtype, device)
    if config is not None and not isinstance(config, Mapping):
        raise ShapeError(f"config is {config!r}; it must be a dict of settings of the backend's kernels")
    declared = checked_signature(variant, dims)
    sizes = checked_dims(declared, dims)
    if dtype not in DTYPES:
        raise DeclarationError(f"dtype {dtype} is not supported; use one of {', '.join(map(str, DTYPES))}")
    if backend not in ("auto", *BACKENDS):
        raise _refused(backend, [f"there is no such backend in this version; there are auto, {', '.join(BACKENDS)}"])
    if chunk is not None and (whole(chunk) or 0) < 1:
        raise ShapeError(f"chunk is {chunk!r}; it must be a positive int")
    known = checkpoint is None or (isinstance(checkpoint, str) and checkpoint == "auto")
    if not known and ((n := whole(checkpoint)) is None or n < 0):
        raise ShapeError(f'checkpoint is {checkpoint!r}; it must be "auto", None or a number of chunks')
    chunk, checkpoint = whole(chunk), checkpoint if known else whole(checkpoint)
    if decode not in ("auto", "sums", "rows"):
        raise ShapeError(f'decode is {decode!r}; it must be "auto", "sums" or "rows"')
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError):
        raise DeclarationError(f'device is {device!r}; it is "cpu", "cuda" or a torch.device') from None
    candidates, asked = _candidates(backend, place)
    refused: dict[str, str] = {}
    absent: dict[str, str] = {}
    for taken in candidates:  # the last one runs, or is refused
        if not asked and (gone := _missing(taken)):
            absent[taken] = gone[0]
            continue
        chosen = _backend(taken, place, dtype)
        lookup = Lookup(taken, chosen, place, dtype, chunk, checkpoint, config)
        numbers = "f64" if dtype == torch.float64 else "f32"
        stages = run_pipeline(declared, Options(sizes, numbers, chunk, telemetry, lookup.chosen_chunk, chosen.chunk))
        reasons = [*_misplaced(taken, place), *chosen.refusals(stages.program)]
        if not reasons:
            break
        refused[taken] = reasons[0]
    if reasons:
        raise _refused(taken, reasons)
    warn_of_fallback(declared, taken, refused, absent)
    declined = [f"not {name}: {reason}" for name, reason in (absent | refused).items()]
    why = "; ".join([f"{taken}: {asked or REASONS[taken]}", *declined, *chosen.notes(stages.program)])
    began = time.perf_counter()
    source = chosen.emit(stages.program)
    scans = chosen.load(source, stages.program, _checked_config(lookup, taken, chosen, stages.program))
    if not asked:
        scans = with_standby(scans, declared.name, taken)
    milliseconds = (time.perf_counter() - began) * 1e3
    stages.entries.append(Entry("emit", len(stages) + 1, len(stages) + 1, None, milliseconds, source))
    return Layer(
        declared,
        stages,
        scans,
        source,
        dims=sizes,
        dtype=dtype,
        device=place,
        backend=taken,
        why=why,
        checkpoint=checkpoint,
        decode=decode,
        tuning=lookup.tuning,
        settings={
            "dims": sizes,
            "dtype": dtype,
            "device": place,
            "backend": backend,
            "chunk": chunk,
            "checkpoint": checkpoint,
            "config": config,
            "decode": decode,
            "telemetry": telemetry,
        },
        recompile=compiled_again,
    )


def compiled_again(declared: PickledVariant, settings: Mapping[str, Any]) -> Layer:
    """The layer of a declaration that was read from a file, and of the settings of `compile`."""
    return compile(declared.variant, **settings)


def program_for(variant: type[Variant], dims: Mapping[str, int], backend: str) -> Program:
    """The program that a backend is given to make kernels for a GPU that need not be there; float32, untuned."""
    declared = checked_signature(variant, dims)
    # tvm's own preference is for the caches of a CPU
    preferred = tvm_backend.only_chunk if backend == "tvm" else BACKENDS[backend].chunk
    options = Options(checked_dims(declared, dims), preferred=preferred)
    return run_pipeline(declared, options).program


def _candidates(backend: str, device: torch.device) -> tuple[list[str], str]:
    """The backends to try, the best first, and how a single one was asked for.

    "auto" is what the environment variable TTTC_BACKEND names, otherwise whatever there is for the device.
    """
    if backend != "auto":
        return [backend], "asked for by name"
    named = os.environ.get("TTTC_BACKEND", "auto")
    if named not in ("auto", *BACKENDS):
        raise _refused(named, [f"TTTC_BACKEND names no backend; there are auto, {', '.join(BACKENDS)}"])
    if named != "auto":
        return [named], "TTTC_BACKEND asks for it"
    native = {"cpu": ["tvm"], "cuda": ["triton"]}
    return [*native.get(device.type, []), "torch"], ""


def _missing(backend: str) -> list[str]:
    """Why there is no such backend on this machine, whatever the program."""
    return {"tvm": tvm_backend.missing, "triton": triton_backend.missing}.get(backend, list)()


def _backend(name: str, device: torch.device, dtype: torch.dtype) -> Backend:
    """What makes the kernels for a device."""
    return CudaBackend(dtype, device) if name == "tvm" and device.type == "cuda" else BACKENDS[name]


def _checked_config(lookup: Lookup, name: str, backend: Backend, program: Program) -> dict[str, int]:
    """The settings of kernels: given, or tuned; those that are given must exist."""
    known = backend.choices(program)
    config = lookup.chosen_config(known)
    bad = [f"{n}={v!r}" for n, v in config.items() if n not in known or (whole(v) or 0) < 1]
    if bad:
        said = f"has {', '.join(known)}, each a positive int" if known else "has no settings"
        raise ShapeError(f"config has {', '.join(bad)}; backend {name!r} {said}")
    return config


def _misplaced(backend: str, device: torch.device) -> list[str]:
    """Why a backend cannot run on the device."""
    if backend == "triton":
        return triton_backend.unavailable(device)
    return unavailable(device) if backend == "tvm" and device.type != "cpu" else []


def _refused(backend: str, reasons: list[str]) -> BackendRefusal:
    """The error of a backend that was asked for by name."""
    listed = "\n".join(f"  - {r}" for r in reasons)
    return BackendRefusal(f'backend {backend!r} cannot run this program:\n{listed}\n  Use backend="torch" or "auto".')


def checked_dims(declared: Signature, dims: Mapping[str, int]) -> dict[str, int]:
    """The size of every dim that the declaration names; raises `ShapeError` where one is missing or none."""
    missing = [d for d in declared.dims if d not in dims]
    if missing:
        users = {
            d: [n for n, s in (declared.tokens | declared.states | declared.params).items() if d in s.dims]
            for d in missing
        }
        said = "; ".join(f"{d} (an axis of {', '.join(names)})" for d, names in users.items())
        example = ", ".join(f'"{d}": 64' for d in declared.dims)
        raise ShapeError(f"variant `{declared.name}`: no size is given for {said}.\n  Pass dims={{{example}}}.")
    bad = {d: n for d, n in dims.items() if (whole(n) or 0) < 1}
    if bad:
        said = ", ".join(f"{d}={n!r}" for d, n in bad.items())
        raise ShapeError(f"variant `{declared.name}`: {said}.\n  Every dim is a positive int.")
    return {d: int(dims[d]) for d in declared.dims}
