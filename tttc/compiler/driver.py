"""`tttc.compile`: from a declaration to a layer."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import torch

from tttc.attention import AttentionLayer, NonParametric, compile_attention
from tttc.backends import registry
from tttc.backends.interface import Backend, EmittedProgram, Placement, Source
from tttc.backends.registry import Unit
from tttc.backends.scan import CompiledScan
from tttc.compiler.fallback import warn_of_fallback
from tttc.compiler.kernel_check import check_kernels
from tttc.compiler.pipeline import History, HistoryEntry, Options, advance
from tttc.compiler.stage_check import checking
from tttc.declare.checks import checked_signature
from tttc.declare.number import whole
from tttc.declare.pickling import PickledVariant
from tttc.declare.variant import Signature, Variant
from tttc.errors import BackendRefusal, DeclarationError, ShapeError
from tttc.ir.program import AdjointProgram, TokenProgram
from tttc.runtime.layer import Layer
from tttc.runtime.standby import with_standby
from tttc.tuning.lookup import Lookup

CHUNK_OF_KERNELS = 64  # tokens at weights that stay, which are read once for each; in torch all tokens are one product
SUPPORTED_DTYPES = {torch.float64: "f64", torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


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
    given = Settings(dims, dtype, device, backend, chunk, checkpoint, config, decode, telemetry)
    return _made(_checked(variant, given))


def compile_program(program: TokenProgram, declared: Signature, settings: Settings) -> Layer:
    """A layer from a program of the stage `declare`, of which the class need not be there. Raises `BackendRefusal`."""
    return _made(Request(declared, settings, (HistoryEntry("declare", 1, program, 0.0, {}),)))


def _made(request: Request) -> Layer:
    """The layer that was asked for."""
    taken, stages, scans = made_of(request)
    return Layer(
        request.declared,
        stages,
        scans,
        stages.of(EmittedProgram).source,
        request.settings,
        backend=taken.unit.name,
        why=taken.why,
        tuning=taken.lookup.tuning,
        recompile=compiled_again,
    )


def made_of(request: Request) -> tuple[Taken, History, Mapping[str, CompiledScan]]:
    """What a request gets: its backend, the stages to the last one, and the kernels."""
    taken = _choose(request, runs=True)
    config = _checked_config(taken)
    stages = _emitted(taken, config)
    source = stages.of(EmittedProgram).source
    scans = taken.backend.load_scans(source, taken.program, config, request.place)
    if checking():
        check_kernels(taken.program, scans, request.place.device)
    if not taken.asked:
        scans = with_standby(scans, request.declared.name, taken.unit.name)
    return taken, stages, scans


def compiled_again(declared: PickledVariant, settings: Mapping[str, Any]) -> Layer:
    """The layer of a declaration that was read from a file, and of the settings of `compile`."""
    return compile(declared.variant, **settings)


def source_of(
    variant: type[Variant],
    dims: Mapping[str, int],
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    backend: str = "auto",
) -> Source:
    """What `tttc.compile` would generate, on a machine that need not be able to run it. Raises as it does."""
    taken = _choose(_checked(variant, Settings(dims, dtype, device, backend)), runs=False)
    return _emitted(taken, _checked_config(taken)).of(EmittedProgram).source


def untuned(variant: type[Variant], dims: Mapping[str, int], backend: Backend) -> AdjointProgram:
    """The program that a backend is given where nothing was tuned; float32."""
    declared = checked_signature(variant, dims)
    options = Options(checked_dims(declared, dims), backend=backend)
    return advance(History(declared), options, "adjoint").program


# -- what was asked for ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """The arguments of `compile` beside the declaration."""

    dims: Mapping[str, int]
    dtype: torch.dtype
    device: Any
    backend: str
    chunk: int | None = None
    checkpoint: int | str | None = "auto"
    config: Mapping[str, int] | None = None
    decode: str = "auto"
    telemetry: bool = False


@dataclass(frozen=True)
class Request:
    """A declaration and its settings, found to be right."""

    declared: Signature
    settings: Settings
    begun: tuple[HistoryEntry, ...] = ()
    """The stages that are already there."""
    frozen: bool = False
    """Whether only the output is asked for, at weights that stay."""

    @property
    def place(self) -> Placement:
        return Placement(self.settings.device, self.settings.dtype)


def _checked(variant: type[Variant], given: Settings) -> Request:
    """The request with sizes, numbers and the device as such; raises what `compile` does."""
    if given.config is not None and not isinstance(given.config, Mapping):
        raise ShapeError(f"config is {given.config!r}; it must be a dict of settings of the backend's kernels")
    return checked_request(checked_signature(variant, given.dims), given)


def checked_request(declared: Signature, given: Settings) -> Request:
    """The same, of a declaration that is right."""
    sizes = checked_dims(declared, given.dims)
    if given.dtype not in SUPPORTED_DTYPES:
        raise DeclarationError(
            f"dtype {given.dtype} is not supported; use one of {', '.join(map(str, SUPPORTED_DTYPES))}"
        )
    if given.backend not in ("auto", *registry.names()):
        known = f"there is no such backend in this version; there are auto, {', '.join(registry.names())}"
        raise _refused(given.backend, [known])
    if given.chunk is not None and (whole(given.chunk) or 0) < 1:
        raise ShapeError(f"chunk is {given.chunk!r}; it must be a positive int")
    checkpoint = _checked_checkpoint(given.checkpoint)
    if given.decode not in ("auto", "sums", "rows"):
        raise ShapeError(f'decode is {given.decode!r}; it must be "auto", "sums" or "rows"')
    try:
        place = torch.device(given.device)
    except (RuntimeError, TypeError):
        raise DeclarationError(f'device is {given.device!r}; it is "cpu", "cuda" or a torch.device') from None
    return Request(declared, replace(given, dims=sizes, device=place, chunk=whole(given.chunk), checkpoint=checkpoint))


def _checked_checkpoint(given: int | str | None) -> int | str | None:
    if given is None or (isinstance(given, str) and given == "auto"):
        return given
    n = whole(given)
    if n is None or n < 0:
        raise ShapeError(f'checkpoint is {given!r}; it must be "auto", None or a number of chunks')
    return n


# -- what is taken -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Taken:
    """The backend that a request gets, the stages that lead to it, and why it is this one."""

    unit: Unit
    backend: Backend
    stages: History
    options: Options
    lookup: Lookup
    asked: str
    """How it was asked for; "auto" does not."""
    why: str

    @property
    def program(self) -> AdjointProgram:
        return self.stages.program


def _choose(request: Request, runs: bool) -> Taken:
    """The first backend that can make kernels of the program; one that `runs` can also run them on the device."""
    given, device = request.settings, request.settings.device
    candidates, asked = _candidates(given.backend, device)
    refused: dict[str, str] = {}
    absent: dict[str, str] = {}
    numbers = "f64" if given.dtype == torch.float64 else "f32"
    options = Options(given.dims, numbers, given.chunk, given.telemetry, place=request.place, frozen=request.frozen)
    common = advance(History(request.declared, request.begun), options, "dualize")
    for unit in candidates:  # the last one runs, or is refused
        if not asked and (gone := unit.missing()):
            absent[unit.name] = gone[0]
            continue
        backend = unit.backend
        lookup = Lookup(unit, given)
        options = replace(options, tuned=lookup.chosen_chunk, backend=backend)
        if request.frozen and given.chunk is None:
            options = replace(options, chunk=None if unit.of_torch else CHUNK_OF_KERNELS)
        stages = advance(common, options, "adjoint")
        reasons = [*(unit.unavailable(device) if runs else unit.unwritten()), *backend.refusals(stages.program)]
        if not reasons:
            break
        refused[unit.name] = reasons[0]
    if reasons:
        raise _refused(unit.name, reasons)
    warn_of_fallback(request.declared, unit.name, refused, absent)
    declined = [f"not {name}: {reason}" for name, reason in (absent | refused).items()]
    why = "; ".join([f"{unit.name}: {asked or unit.reason}", *declined, *backend.notes(stages.program)])
    return Taken(unit, backend, stages, options, lookup, asked, why)


def _checked_config(taken: Taken) -> dict[str, int]:
    """The settings of kernels: given, or tuned; those that are given must exist."""
    known = taken.backend.choices(taken.program)
    config = taken.lookup.chosen_config(known)
    bad = [f"{n}={v!r}" for n, v in config.items() if n not in known or (whole(v) or 0) < 1]
    if bad:
        said = f"has {', '.join(known)}, each a positive int" if known else "has no settings"
        raise ShapeError(f"config has {', '.join(bad)}; backend {taken.unit.name!r} {said}")
    return config


def _emitted(taken: Taken, config: Mapping[str, int]) -> History:
    """The stages to the last one, with the kernels made as `config` says."""
    return advance(taken.stages, replace(taken.options, settings=config), "emit")


def _candidates(backend: str, device: torch.device) -> tuple[list[Unit], str]:
    """The backends to try, the best first, and how a single one was asked for.

    "auto" is what the environment variable TTTC_BACKEND names, otherwise whatever there is for the device.
    """
    if backend != "auto":
        return [registry.named(backend, device)], "asked for by name"
    named = os.environ.get("TTTC_BACKEND", "auto")
    if named not in ("auto", *registry.names()):
        raise _refused(named, [f"TTTC_BACKEND names no backend; there are auto, {', '.join(registry.names())}"])
    if named != "auto":
        return [registry.named(named, device)], "TTTC_BACKEND asks for it"
    return registry.candidates(device), ""


def _refused(backend: str, reasons: Sequence[str]) -> BackendRefusal:
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
