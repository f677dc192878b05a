"""`tttc demo`: declare a layer that was made up for it, compile it, prove it, time it, train it.

All that is claimed is measured here and now, on the machine that runs it, and ends up in one HTML page.
"""

from __future__ import annotations

import contextlib
import datetime
import inspect
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.text import Text

from tttc.cli.doctor import cxx_compiler, diagnose
from tttc.cli.loading import full_dims
from tttc.compiler.driver import compile as compile_layer
from tttc.examples.demo import training
from tttc.examples.demo.baselines import (
    Eager,
    Implementation,
    Workload,
    compiled_by_torch,
    faults,
    random_workload,
    time_interleaved,
    time_limit,
)
from tttc.examples.demo.formulas import lines_of
from tttc.examples.demo.layer import GatedLearner
from tttc.examples.demo.report import LossCurve, Report, StageText, TimingRow, milliseconds, write_report
from tttc.ir.latex import program_latex
from tttc.library import TTTMLP, LinearAttention, TTTLinear
from tttc.runtime.layer import Layer
from tttc.terminal import console, error_table, print_program, table
from tttc.verification.comparison import Row, verify

FULL_TEXT_STAGES = ("declare", "differentiate", "simplify", "primal", "dualize")


class DemoFailed(Exception):
    """Something that the demo claims did not hold on this machine."""


@dataclass(frozen=True)
class Effort:
    """How much to measure."""

    size: tuple[int, int, int]  # B, T, H of the timings
    rounds: int
    compile_seconds: float  # for torch.compile; 0 leaves it out
    seconds: float  # for all of it; the training gets what the rest leaves
    validations: int  # points on a learning curve, each of which takes a second or so


FULL = Effort(size=(1, 512, 4), rounds=3, compile_seconds=60, seconds=205, validations=8)
QUICK = Effort(size=(1, 128, 2), rounds=3, compile_seconds=0, seconds=50, validations=3)
LANGUAGE_MODELS = (GatedLearner, TTTLinear, TTTMLP, LinearAttention)


def run_demo(out: Path, quick: bool) -> Path:
    """Run all of it, write the report into the folder `out`, and return where the page is.

    Raises `DemoFailed` if the layer differs from its definition, or if a Test-Time-Training model is no
    better than counting byte pairs; the latter is not asked of a quick run, which is too short to train.
    """
    began = time.perf_counter()
    _make(out)  # now, and not after minutes of measuring
    effort = QUICK if quick else FULL
    declaration = inspect.getsource(GatedLearner)
    dims = full_dims(GatedLearner, {})
    _section(1, "A declaration, which is all that is written by hand")
    print_program(declaration)
    _section(2, "Its mathematics, stage by stage")
    layer = compile_layer(GatedLearner, dims)
    stages = _show_stages(layer)
    _section(3, "Verification: against the declaration itself, token by token in float64")
    verification = _verify()
    _section(4, f"Speed: {_size_text(effort, dims)}")
    with training.one_thread():  # on a busy machine, threads that wait for each other say little about the code
        timings = _time(layer, dims, effort)
    _print_timings(timings)
    _section(5, "Training: byte-level language models on the Python standard library")
    curves, counted = _train(effort, seconds=effort.seconds - (time.perf_counter() - began))
    bigram = None if quick else counted  # which a few seconds of training do not reach: no verdict
    report = Report(
        title=f"{GatedLearner.__name__}: from declaration to trained layer",
        summary=_summary(verification, timings, curves, bigram),
        facts=_facts(began),
        declaration=declaration,
        stages=stages,
        verification=verification,
        timings=timings,
        timing_setup=_timing_text(effort, dims),
        curves=curves,
        training_setup=_training_text(curves),
        bigram=bigram,
        reproduce=["tttc demo --quick" if quick else "tttc demo", "tttc doctor"],
        figures=_figures(verification, timings, curves),
        formulas=_formulas(layer),
    )
    page = write_report(report, out / "report.html").resolve()
    _say("")
    for sentence in report.summary:
        _say(f"  • {sentence}")
    _say(f"\nThe report: {page}    ({time.perf_counter() - began:.0f} s in all)")
    if bigram is not None:
        _demand_learning(curves, bigram)
    return page


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DemoFailed(f"cannot write to {folder}: {error.strerror}.") from error


def _section(number: int, title: str) -> None:
    console().print(Text(f"\n{number}/5  {title}\n", "bold"))


def _say(text: str) -> None:
    console().print(text, soft_wrap=True)


@contextlib.contextmanager
def _working(what: str) -> Iterator[None]:
    """Show that something is under way: a spinner on a terminal, elsewhere a line now and then."""
    if sys.stdout.isatty():
        with console().status(Text(what)):
            yield
        return
    _say(f"{what} ...")
    done = threading.Event()
    began = time.perf_counter()

    def report() -> None:
        while not done.wait(20):
            print(f"  {time.perf_counter() - began:.0f} s", flush=True)

    watcher = threading.Thread(target=report, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def _show_stages(layer: Layer) -> list[StageText]:
    """Print the mathematics; of the longer texts that follow only the length, since the report has them."""
    stages = [StageText(entry.name, entry.milliseconds, str(entry)) for entry in layer.stages]
    for stage in stages:
        if stage.name in FULL_TEXT_STAGES:
            print_program(stage.text)
            _say("")
        else:
            lines = stage.text.rstrip().count("\n") + 1
            _say(f"{stage.name}: {lines} lines in {milliseconds(stage.milliseconds)}, all of them in the report")
    return stages


def _verify() -> Sequence[Row]:
    with _working("running the definition, gradients included"):
        result = verify(GatedLearner)
    console().print(error_table(result.rows))
    if not result.ok and not result.differs:
        raise DemoFailed(f"{result.headline}: {'; '.join(result.reasons)}")
    if not result.ok:
        raise DemoFailed(f"the compiled {GatedLearner.__name__} differs from its definition: see the table above.")
    return result.rows


def _size_text(effort: Effort, dims: dict[str, int]) -> str:
    B, T, H = effort.size
    widths = ", ".join(f"{name} = {size}" for name, size in dims.items())
    return f"batch {B}, {T} tokens, {H} heads, {widths}, float32, one CPU thread"


def _timing_text(effort: Effort, dims: dict[str, int]) -> str:
    return (
        f"Medians over {effort.rounds} interleaved rounds at {_size_text(effort, dims)}; the backward pass gives the "
        "gradients of q, k, v, the gates, the params and the initial state. Only what equals the definition, outputs "
        "and gradients over the first two mini-batches, has a time."
    )


def _time(layer: Layer, dims: dict[str, int], effort: Effort) -> list[TimingRow]:
    """Time the compiled layer and what one would write instead; only what is right gets a time."""
    workload = random_workload(GatedLearner, layer.init_params(), layer.init_state(), dims, effort.size)
    start = workload.first(2 * GatedLearner.mini_batch)
    implementations: dict[str, Implementation] = {"tttc": layer, "PyTorch, vmap(grad)": Eager(GatedLearner)}
    by_torch = "torch.compile(vmap(grad))"
    compiled, note = _compiled_by_torch(start, effort)
    notes = {by_torch: note}
    if compiled is not None:
        implementations[by_torch] = compiled
    with _working("checking outputs and gradients against the definition"):
        wrong = faults(GatedLearner, implementations, start)
    if "tttc" in wrong:
        raise DemoFailed(f"the compiled {GatedLearner.__name__} differs from its definition: {wrong['tttc']}.")
    notes |= wrong
    measured = time_interleaved(
        {name: run for name, run in implementations.items() if name not in wrong},
        workload,
        _announced(effort.rounds),
    )
    rows = []
    for name in dict.fromkeys((*implementations, *notes)):
        forward, backward = measured.get(name, (None, None))
        rows.append(TimingRow(name, forward, backward, notes.get(name, "")))
    return rows


def _compiled_by_torch(workload: Workload, effort: Effort) -> tuple[Implementation | None, str]:
    """The eager program under `torch.compile` and how long that took; or None and why there is none."""
    if not effort.compile_seconds:
        return None, "left out of a quick run: it takes long to compile"
    if cxx_compiler() is None:
        return None, "needs a C++ compiler, and none is installed"
    implementation = compiled_by_torch(GatedLearner)
    began = time.perf_counter()
    limit = effort.compile_seconds
    try:
        with _working(f"torch.compile, {limit:.0f} s at most"), time_limit(limit):
            workload.backward(workload.forward(implementation))
    except Exception as error:  # whatever it raises, the rest of the demo does not depend on it
        return None, f"failed: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return implementation, f"its first call took {time.perf_counter() - began:.0f} s"


def _announced(rounds: int) -> Iterator[int]:
    for number in range(1, rounds + 1):
        _say(f"timing, round {number} of {rounds}")
        yield number


def _print_timings(rows: list[TimingRow]) -> None:
    found = table("implementation", "forward", "backward", "both", "", numbers=("forward", "backward", "both"))
    for row in rows:
        found.add_row(row.name, *map(milliseconds, (row.forward_ms, row.backward_ms, row.total_ms)), row.note)
    console().print(found)


def _train(effort: Effort, seconds: float) -> tuple[list[LossCurve], float]:
    """Train the language models; also what counting byte pairs gives, in bits per byte."""
    try:
        corpus = training.read_corpus()
    except FileNotFoundError as error:
        raise DemoFailed(str(error)) from error
    bigram = training.bigram_bits_per_byte(corpus)
    names = ", ".join(variant.__name__ for variant in LANGUAGE_MODELS)
    bar = sys.stdout.isatty()
    with contextlib.nullcontext() if bar else _working(f"training {names}, about {seconds:.0f} s in all"):
        trained = training.train(
            LANGUAGE_MODELS, seconds=seconds, progress=bar, corpus=corpus, validations=effort.validations
        )
    curves = [_loss_curve(curve) for curve in trained]
    found = table("model", "parameters", "steps", "bits per byte", numbers=("parameters", "steps", "bits per byte"))
    for curve in curves:
        found.add_row(curve.name, f"{curve.parameters:,}", str(curve.steps[-1]), f"{curve.bits_per_byte[-1]:.3f}")
    console().print(found)
    return curves, bigram


def _loss_curve(curve: training.Curve) -> LossCurve:
    steps = [point.step for point in curve.validation]
    return LossCurve(
        name=curve.name,
        parameters=curve.parameters,
        steps=steps,
        seconds=[curve.seconds * step / curve.steps for step in steps],
        bits_per_byte=[point.bits_per_byte for point in curve.validation],
    )


def _training_text(curves: Sequence[LossCurve]) -> str:
    size = training.Size()
    return (
        f"One model per layer, alike in all else: {size.layers} blocks of width {size.hidden} with {size.heads} heads, "
        f"{curves[0].steps[-1]} steps on the same batches of {size.batch} × {size.tokens} bytes, and nearly the same "
        "number of parameters. Minutes on a CPU show that the layers learn, not which of them is best at scale."
    )


def _summary(
    verification: Sequence[Row], timings: Sequence[TimingRow], curves: Sequence[LossCurve], bigram: float | None
) -> list[str]:
    worst = max(row.error for row in verification)
    ours, *others = timings
    times = [f"Its forward and backward pass take {milliseconds(ours.total_ms)}"]
    for row in others:
        if row.total_ms and ours.total_ms:
            times.append(f"{row.name} takes {row.total_ms / ours.total_ms:.1f} times as long")
    losses = ", ".join(f"{curve.name} {curve.bits_per_byte[-1]:.2f}" for curve in curves)
    return [
        f"The compiled layer equals its definition in all {len(verification)} tensors, gradients included: "
        f"the largest relative error is {worst:.1e}.",
        f"{'; '.join(times)}.",
        f"Bits per byte of unseen text after {curves[0].steps[-1]} steps: {losses}"
        + ("." if bigram is None else f"; counting byte pairs gives {bigram:.2f}."),
    ]


def _figures(
    verification: Sequence[Row], timings: Sequence[TimingRow], curves: Sequence[LossCurve]
) -> list[tuple[str, str]]:
    """The three numbers of the run: how much is equal, how much faster, how much is learned."""
    equal = sum(row.ok for row in verification)
    found = [(f"{equal}/{len(verification)}", "tensors equal the definition, gradients included")]
    ours, *others = timings
    slower = [row for row in others if row.total_ms]
    if slower and ours.total_ms:
        least = min(slower, key=lambda row: row.total_ms or 0.0)
        found.append((f"{(least.total_ms or 0.0) / ours.total_ms:.1f}×", f"faster than {least.name}"))
    found.append((f"{curves[0].bits_per_byte[-1]:.2f}", f"bits per byte of unseen text, {curves[0].name}"))
    return found


def _formulas(layer: Layer) -> list[tuple[str, list[str]]]:
    """The gradient and the dual form, as the LaTeX printer has them."""
    found = []
    for stage, title in (("simplify", "The gradient of the loss"), ("dualize", "The dual form, for each mini-batch")):
        program = layer.stages[stage].program
        assert program is not None
        found.append((title, lines_of(program_latex(program))))
    return found


def _facts(began: float) -> list[tuple[str, str]]:
    diagnosis = diagnose()
    machine = [
        (finding.name, finding.found) for finding in (*diagnosis.machine, *diagnosis.packages) if finding.status == "ok"
    ]
    return [
        *(fact for fact in machine if fact[0] not in ("cache", "c++ compiler")),
        ("date", datetime.date.today().isoformat()),
        ("time taken", f"{time.perf_counter() - began:.0f} s"),
    ]


def _demand_learning(curves: Sequence[LossCurve], bigram: float) -> None:
    learners = {variant.__name__ for variant in LANGUAGE_MODELS if variant is not LinearAttention}
    failed = [curve.name for curve in curves if curve.name in learners and not curve.bits_per_byte[-1] < bigram]
    if failed:
        raise DemoFailed(
            f"after {curves[0].steps[-1]} steps, all that the time allowed, {', '.join(failed)} is no better than "
            f"counting byte pairs ({bigram:.3f} bits per byte)."
        )
