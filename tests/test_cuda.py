"""Kernels for a GPU: executed on the CPU as a block of threads would (cuda_emulator.py), and compiled by nvcc.

Every kernel runs twice, its threads in order and in reverse: where the bits differ, a barrier is missing. Shared memory
and workspaces hold NaN at first.
"""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import tttc
from tests.cuda_emulator import Emulator
from tests.helpers import LIBRARY, dims_of, keywords, layer_result, oracle_result
from tests.test_tvm import converted, half_errors
from tttc.backends import nvidia
from tttc.backends.target import OLDEST, Resources, Target
from tttc.backends.tvm_common.scan import stored_tokens
from tttc.backends.tvm_cuda.device import gpu
from tttc.backends.tvm_cuda.kernel_text import CudaSource
from tttc.backends.tvm_cuda.load import compiled, unavailable
from tttc.backends.tvm_cuda.scan import CudaScan
from tttc.backends.tvm_cuda.smem import Variable, allocate
from tttc.errors import BackendRefusal, ShapeError
from tttc.library import GatedDeltaNet, LinearAttention, TTTLinear
from tttc.reference import reference
from tttc.verification.comparison import gradient_errors, random_inputs, relative_error

pytestmark = pytest.mark.skipif(find_spec("tvm") is None, reason="apache-tvm is an extra: pip install 'tttc[tvm]'")
compiles = pytest.mark.skipif(bool(nvidia.missing()), reason=f"cannot compile CUDA: {'; '.join(nvidia.missing())}")

TOKENS = 20  # a mini-batch of 16 and a tail
# float32 rounds at 6e-8, some hundred operations in a row; bfloat16 has 8 bits and
# float16 has 11, and a state rounds once for every product that reads it.
OUTPUT = {"float32": 5e-6, "bfloat16": 1.5e-2, "float16": 2e-3}


@pytest.fixture
def folder(tmp_path_factory):
    """Where this run keeps what g++ made, for all its tests."""
    made = tmp_path_factory.getbasetemp() / "emulated"
    made.mkdir(exist_ok=True)
    return made


def emulated(variant, dims, device, launch, dtype=torch.float32, **settings):
    """A layer whose kernels are those for a GPU, run by `launch`."""
    return launched(tttc.compile(variant, dims, dtype, **settings), device, launch)


def launched(layer, device, launch):
    """The layer with such kernels instead of those it has."""
    program = layer.stages.program
    layer._scans = {scan.name: CudaScan(scan, program, device, launch) for scan in program.scans}
    layer.accepts_16bit = all(s.accepts_16bit for s in layer._scans.values())
    return layer


def both_orders(variant, dims, device, folder, inputs, run, **settings):
    """The result with the threads in order; it must have the bits of that with the threads in reverse."""
    layer = tttc.compile(variant, dims, torch.float32, **settings)
    return [run(launched(layer, device, Emulator(folder, reverse=r)), inputs) for r in (False, True)]


def forward(layer, inputs):
    with torch.no_grad():
        z, state = layer(inputs.q, inputs.k, inputs.v, **keywords(inputs))
    return {"z": z, **{f"state {n}": x for n, x in state.items()}}


def errors(name, D, folder, dtype="float32", tokens=TOKENS, threads=64, **settings):
    """The forward of a variant: its errors relative to the oracle, which is float64."""
    variant = LIBRARY[name].replace(**settings)
    dims = dims_of(variant, D, 2 * D)
    layer = tttc.compile(variant, dims, torch.float32)
    inputs = converted(random_inputs(layer.signature, layer.dims, 1, tokens, 2), torch.float32)
    first, second = both_orders(variant, dims, gpu(dtype, threads=threads), folder, inputs, forward)
    assert [n for n, x in first.items() if not torch.equal(x, second[n])] == [], "the order of the threads matters"
    exact = converted(inputs, torch.float64)
    z, state = reference(variant, exact.q, exact.k, exact.v, **keywords(exact))
    wanted = {"z": z, **{f"state {n}": x for n, x in state.items()}}
    return {n: float(relative_error(x, wanted[n])) for n, x in first.items()}


def wrong(found, dtype="float32"):
    """What is too far off. A state adds up the steps of all tokens, each taken at rounded weights: twice an output."""
    twice = 1 if dtype == "float32" else 2
    return {n: e for n, e in found.items() if not e <= OUTPUT[dtype] * (1 if n == "z" else twice)}


# -- results -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LIBRARY)
def test_every_library_variant_equals_the_oracle(name, folder):
    assert not wrong(errors(name, 16, folder))


@pytest.mark.parametrize(
    ("name", "D", "threads"),
    [("TTTLinear", 3, 32), ("GatedDeltaNet", 17, 96), pytest.param("TTTMLP", 40, 256, marks=pytest.mark.slow)],
)
def test_any_width_and_any_number_of_threads(name, D, threads, folder):
    """Widths that are no multiple of anything, one warp, and three."""
    assert not wrong(errors(name, D, folder, tokens=37, threads=threads))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    "name", [n if n in ("TTTLinear", "GatedDeltaNet") else pytest.param(n, marks=pytest.mark.slow) for n in LIBRARY]
)
def test_tensor_cores(name, dtype, folder):
    """Products of rounded operands; a width of 17 fills one tile and one row of the next."""
    found = errors(name, 17, folder, dtype)
    assert not wrong(found, dtype)
    assert max(found.values()) > 1e-6, "nothing was rounded"


@pytest.mark.parametrize("read", ["before", "end"])
def test_every_read(read, folder):
    assert not wrong(errors("TTTLinear", 3, folder, tokens=9, read=read, mini_batch=4))


@pytest.mark.parametrize(
    "name", [n if n in ("TTTLinear", "LinearAttention") else pytest.param(n, marks=pytest.mark.slow) for n in LIBRARY]
)
def test_the_backward_equals_that_of_the_oracle(name, folder):
    """Every gradient, from carries that are kept at every second chunk."""
    variant = LIBRARY[name]
    dims = dims_of(variant, 16, 24)
    layer = tttc.compile(variant, dims, torch.float32)
    inputs = converted(random_inputs(layer.signature, dims, 1, 37, 2), torch.float32)
    first, second = both_orders(variant, dims, gpu("float32", threads=64), folder, inputs, layer_result, checkpoint=2)
    wanted = oracle_result(variant, converted(inputs, torch.float64)).gradients
    # Twice the operations of an output; but where float32 in PyTorch is itself further off, as in Titans, half as much
    # again as that.
    others = gradient_errors(layer_result(layer, inputs).gradients, wanted)
    allowed = {n: max(2 * OUTPUT["float32"], 1.5 * float(e)) for n, e in others.items()}
    off = {n: float(e) for n, e in gradient_errors(first.gradients, wanted).items() if not e <= allowed[n]}
    assert not off, allowed
    assert max(allowed.values()) < 5e-5
    assert all(torch.equal(x, second.gradients[n]) for n, x in first.gradients.items())


def test_strided_inputs_are_read_where_they_lie(folder):
    layer = emulated(TTTLinear, {"D": 16}, gpu("float32", threads=64), Emulator(folder))
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 20, 3, 17, generator=generator)[..., 1:].unbind()
    gates = {n: torch.rand(2, 20, 6, generator=generator)[:, :, ::2] for n in ("lr", "tau")}
    state = {"W1": torch.randn(2, 3, 16, 20, generator=generator)[..., :16]}
    z, _ = layer(q, k, v, gates=gates, state=state)
    whole = [{n: x.contiguous() for n, x in group.items()} for group in (gates, state)]
    wanted, _ = layer(*(x.contiguous() for x in (q, k, v)), gates=whole[0], state=whole[1])
    assert torch.equal(z, wanted)
    assert z.is_contiguous()


@pytest.mark.parametrize(("dtype", "unit"), [(torch.bfloat16, 2**-9), (torch.float16, 2**-12)])
def test_half_precision_is_storage(dtype, unit, folder):
    """Inputs are read as they are, arithmetic is float32, and each result is rounded once: half a unit at most."""
    layer = emulated(LinearAttention, {"D": 17}, gpu("float32", threads=64), Emulator(folder), dtype)
    assert max(half_errors(layer, dtype)) <= unit


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_tensor_cores_on_stored_halves(dtype, folder):
    """As a layer in half precision runs them. A gradient is rounded as an output is, and as often again."""
    layer = emulated(LinearAttention, {"D": 17}, gpu(dtype, threads=64), Emulator(folder), getattr(torch, dtype))
    assert max(half_errors(layer, getattr(torch, dtype))) <= 2 * OUTPUT[dtype]


def test_what_does_not_fit_on_the_chip_lies_outside(folder):
    """The same numbers, whatever lies where."""
    layers, results = [], []
    for size in (OLDEST.shared, 6000, 2000):
        layer = emulated(TTTLinear, {"D": 16}, replace(gpu("float32", threads=64), shared=size), Emulator(folder))
        inputs = converted(random_inputs(layer.signature, layer.dims, 1, TOKENS, 2), torch.float32)
        results.append(forward(layer, inputs))
        layers.append(layer._scans["ttt_linear"].source())
    sizes = [(s.shared, len(s.workspaces)) for s in layers]
    assert sizes[0][1] == 0 < sizes[1][1] < sizes[2][1], sizes
    assert all(s.shared <= limit for s, limit in zip(layers, (1 << 18, 6000, 2000), strict=True)), sizes
    assert all(torch.equal(x, other[n]) for other in results[1:] for n, x in results[0].items())


class Odd(tttc.Variant):
    """Names that mean something in CUDA, in C++, or in the kernel."""

    mini_batch = 4
    read = "after"
    shared = tttc.state("D", "D")
    half = tttc.state("D")
    b = tttc.state("D")
    q_chunk = tttc.param("D", init=1.0)
    h = tttc.param("D", init=0.0)

    def learner(self, x):
        return (x @ self.shared + self.half + self.b) * self.q_chunk + self.h

    def loss(self, k, v):
        return 0.5 * tttc.sum((self.learner(k) - v) ** 2)

    update = tttc.sgd(lr=tttc.gate("tiles"))


def test_any_name_is_a_good_name(folder):
    dims = {"D": 8}
    layer = tttc.compile(Odd, dims, torch.float32)
    inputs = converted(random_inputs(layer.signature, dims, 1, 10, 2), torch.float32)
    found = forward(emulated(Odd, dims, gpu("bfloat16", threads=64), Emulator(folder)), inputs)
    wanted = forward(layer, inputs)
    assert max(float(relative_error(x, wanted[n])) for n, x in found.items()) <= OUTPUT["bfloat16"]


# -- barriers ----------------------------------------------------------------------------------------------------------


class Damaged(Emulator):
    """Launches kernels that lack one barrier, or all of a kind."""

    def __init__(self, folder, barrier, number=None, **settings):
        super().__init__(folder, **settings)
        self.barrier, self.number = barrier, number

    def __call__(self, source, blocks, arguments):
        counted = iter(range(1 << 20))
        text = re.sub(
            re.escape(self.barrier), lambda m: "" if self.number in (None, next(counted)) else m[0], source.text
        )
        assert text != source.text or "_close" in source.name, "there is nothing to leave out"
        super().__call__(replace(source, text=text), blocks, arguments)


def noticed(variant, dims, device, folder, barrier, number=None):
    """Whether a test like those above would see that the barrier is missing."""
    layer = tttc.compile(variant, dims, torch.float32)
    inputs = converted(random_inputs(layer.signature, dims, 1, 37, 2), torch.float32)
    wanted, found = forward(layer, inputs), []
    for reverse in (False, True):
        other = emulated(variant, dims, device, Damaged(folder, barrier, number, reverse=reverse))
        found.append(forward(other, inputs))
    return any(not relative_error(x, wanted[n]) <= 1e-3 or not torch.equal(x, found[1][n]) for n, x in found[0].items())


@pytest.mark.parametrize(
    ("barrier", "dtype"),
    [("__syncthreads();", "float32"), ("__syncthreads();", "bfloat16"), ("__syncwarp();", "bfloat16")],
)
def test_missing_barriers_are_noticed(barrier, dtype, folder):
    assert noticed(TTTLinear, {"D": 16}, gpu(dtype, threads=64), folder, barrier)


@pytest.mark.slow
def test_no_barrier_can_be_left_out(folder):
    """Each of the kernel by itself: none is there without a need, and each need is seen."""
    device = gpu("float32", threads=64)
    layer = emulated(LinearAttention, {"D": 16}, device, Emulator(folder))
    text = layer._scans["linear_attention"].source().text
    count = text.count("__syncthreads();")
    found = [noticed(LinearAttention, {"D": 16}, device, folder, "__syncthreads();", i) for i in range(count)]
    assert count > 3
    assert sum(found) >= count - 2, found  # the last of a chunk and the first of the next may guard the same values


def test_memory_is_shared_only_by_what_is_never_alive_together():
    generator = random.Random(0)
    for _ in range(200):
        made = []
        for i in range(generator.randrange(1, 25)):
            begin = generator.randrange(20)
            size = (generator.randrange(1, 4000),)
            made.append(Variable(f"x{i}", size, "float32", begin, begin + generator.randrange(6)))
        layout = allocate(made, 20_000)
        assert layout.size <= 20_000
        assert len(layout.offsets) + len(layout.outside) == len(made)
        inside = list(layout.inside.values())
        for i, x in enumerate(inside):
            assert layout.offsets[x.name] + x.bytes <= layout.size
            assert not any(x.meets(y) and layout.same_place(x.name, y.name) for y in inside[:i])


# -- text --------------------------------------------------------------------------------------------------------------


def test_the_source_can_be_read(golden):
    layer = emulated(LinearAttention, {"D": 16}, gpu("float32"), None)
    golden("cuda/linear_attention", layer._scans["linear_attention"].source().text)


def test_a_source_is_text_and_a_few_numbers():
    layer = emulated(GatedDeltaNet, {"D": 16}, replace(gpu("bfloat16"), shared=24_000), None)
    source = layer._scans["gated_delta_net"].source()
    assert source.workspaces
    assert CudaSource.from_json(source.to_json()) == source
    assert json.loads(source.to_json())["name"] == "gated_delta_net_kernel"


WITHOUT_TVM = """
import sys
from pathlib import Path
import torch
from tests.cuda_emulator import Emulator
from tests.test_cuda import emulated
from tttc.backends.tvm_cuda.device import gpu
from tttc.library import LinearAttention

sys.modules["tvm"] = None  # as if it were not installed
layer = emulated(LinearAttention, {"D": 6}, gpu("float32", threads=64), Emulator(Path(sys.argv[1])))
q, k, v = torch.ones(3, 1, 5, 1, 6).unbind()
print(layer(q, k, v, gates={n: torch.ones(1, 5, 1) for n in layer.signature.gates})[0].sum().item())
"""


def test_a_kept_kernel_runs_without_tvm(tmp_path, monkeypatch):
    monkeypatch.setenv("TTTC_CACHE_DIR", str(tmp_path))
    command = dict(args=[sys.executable, "-c", WITHOUT_TVM, tmp_path], capture_output=True, text=True)
    command["cwd"] = Path(__file__).parents[1]
    layer = emulated(LinearAttention, {"D": 6}, gpu("float32", threads=64), Emulator(tmp_path))
    q, k, v = torch.ones(3, 1, 5, 1, 6).unbind()
    z, _ = layer(q, k, v, gates={n: torch.ones(1, 5, 1) for n in layer.signature.gates})
    done = subprocess.run(**command)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{z.sum().item()}\n"


# -- compilers ---------------------------------------------------------------------------------------------------------


@compiles
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", [n if n == "TTTLinear" else pytest.param(n, marks=pytest.mark.slow) for n in LIBRARY])
def test_every_library_variant_compiles(name, dtype, target):
    """At the width of the papers, its tokens in the dtype of the products; a kernel has the registers and the memory
    that one block may have, and hardly any spills but LaCT, a chunk of 2048 tokens and three matrices made orthogonal
    in one kernel.
    """
    variant, there = LIBRARY[name], Target(target)
    program = tttc.compile(variant, dims_of(variant, 64), torch.float32).stages.program
    scan = CudaScan(program.scans[0], program, gpu(dtype, there))
    found = compiled(scan.source(stored=stored_tokens(scan.scan, getattr(torch, dtype))), target)[2]
    assert 16 <= found.registers <= 255
    assert 0 < found.shared <= there.shared
    assert found.spilled <= (8192 if name == "LaCT" else 512)


def test_from_sm_100_on_triton_has_an_assembler_of_its_own(monkeypatch):
    monkeypatch.setattr(nvidia, "_of_triton", lambda name: f"/triton/{name}")
    monkeypatch.setattr(nvidia, "_tool", lambda name: None)
    assert nvidia.ptxas("sm_100a") == nvidia.ptxas("sm_120") == "/triton/ptxas-blackwell"
    assert nvidia.ptxas("sm_90a") == nvidia.ptxas() == "/triton/ptxas"
    monkeypatch.setattr(nvidia, "_tool", lambda name: f"/cuda/{name}")
    assert (nvidia.ptxas("sm_90a"), nvidia.ptxas("sm_100a")) == ("/cuda/ptxas", "/triton/ptxas-blackwell")
    monkeypatch.setattr(nvidia, "_of_triton", lambda name: None)
    assert nvidia.ptxas("sm_100a") == "/cuda/ptxas"


def test_what_ptxas_says_is_understood():
    said = (
        "ptxas info    : Compiling entry function 'f' for 'sm_90'\n"
        "ptxas info    : Function properties for f\n"
        "    8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads\n"
        "ptxas info    : Used 40 registers, used 1 barriers, 8 bytes cumulative stack size, 96 bytes smem\n"
        "ptxas info    : Compiling entry function 'g' for 'sm_90'\n"
        "ptxas info    : Used 255 registers, used 0 barriers\n"
    )
    assert nvidia.report(said, "sm_90") == [
        Resources("f", "sm_90", 40, 12, 96),
        Resources("g", "sm_90", 255, 0, 0),
    ]


@compiles
def test_source_that_is_no_cuda_is_an_error_that_says_where():
    with pytest.raises(nvidia.ToolkitMissing, match=r"kernel\.cu"):
        nvidia.ptx("__global__ void f() { g(); }", "sm_80")


# -- a GPU -------------------------------------------------------------------------------------------------------------


def test_without_a_gpu_it_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendRefusal, match=r"torch finds no NVIDIA GPU for cuda.*tttc compile --target"):
        tttc.compile(TTTLinear, {"D": 4}, device="cuda", backend="tvm")
    assert tttc.compile(TTTLinear, {"D": 4}, device="cuda").backend == "torch"
    assert unavailable(torch.device("mps")) == ["it runs on a CPU or an NVIDIA GPU, not on mps"]


def test_on_a_gpu_the_kernels_are_those_for_it(monkeypatch):
    monkeypatch.setattr("tttc.backends.tvm_cuda.unavailable", lambda device: [])
    monkeypatch.setattr("tttc.backends.tvm_cuda.device.architecture_of", lambda device: "sm_90")
    layer = tttc.compile(TTTLinear, {"D": 4}, torch.bfloat16, "cuda", "tvm")
    assert all(isinstance(s, CudaScan) for s in layer._scans.values())
    assert {s.device for s in layer._scans.values()} == {gpu("bfloat16", Target("sm_90"))}
    assert layer.accepts_16bit
    with pytest.raises(ShapeError, match="config has tile_rows=4; backend 'tvm' has no settings"):
        tttc.compile(TTTLinear, {"D": 4}, device="cuda", backend="tvm", config={"tile_rows": 4})


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", LIBRARY)
def test_on_a_gpu(name, dtype):
    """Outputs and gradients, of the layer as a user calls it."""
    variant = LIBRARY[name]
    layer = tttc.compile(variant, dims_of(variant, 64, 128), getattr(torch, dtype), "cuda", "tvm")
    inputs = random_inputs(layer.signature, layer.dims, 2, 50, 2)
    short = converted(converted(inputs, getattr(torch, dtype)), torch.float32)
    wanted = oracle_result(variant, converted(short, torch.float64))
    there = on(short, "cuda", getattr(torch, dtype))
    z, state = layer(there.q, there.k, there.v, **keywords(there))
    found = {"z": float(relative_error(z.cpu().double(), wanted.z))}
    found |= {f"state {n}": float(relative_error(state[n].cpu(), w)) for n, w in wanted.final.items()}
    assert not wrong(found, dtype)
    z.float().sum().backward()
    assert all(torch.isfinite(x.grad).all() for x in (there.q, there.k, there.v))


@pytest.mark.gpu
def test_it_runs_on_the_stream_of_torch():
    layer = tttc.compile(TTTLinear, {"D": 64}, device="cuda", backend="tvm")
    inputs = on(random_inputs(layer.signature, layer.dims, 1, 64, 2), "cuda", torch.float32)
    with torch.no_grad():
        wanted, _ = layer(inputs.q, inputs.k, inputs.v, **keywords(inputs))
        with torch.cuda.stream(torch.cuda.Stream()) as _:
            z, _ = layer(inputs.q, inputs.k, inputs.v, **keywords(inputs))
            torch.cuda.current_stream().synchronize()
    assert torch.equal(z, wanted)


def on(inputs, device, dtype):
    """The inputs there, q, k and v in this dtype."""

    def to(x, dtype=torch.float32):
        return x.detach().to(device, dtype).requires_grad_()

    groups = {n: {k: to(x) for k, x in getattr(inputs, n).items()} for n in ("gates", "params", "state")}
    groups["tokens"] = {k: to(x, dtype) for k, x in inputs.tokens.items()}
    return replace(inputs, q=to(inputs.q, dtype), k=to(inputs.k, dtype), v=to(inputs.v, dtype), **groups)
