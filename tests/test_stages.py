"""Every stage of every library variant, as printed: it runs as a Python file and computes what the oracle computes."""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

import tttc
from tests.helpers import LIBRARY, MINI_BATCHES, READS, VARIANTS, compiled, dims_of, inputs_for, oracle_result
from tttc.backends.garbage import gc_paused
from tttc.compiler.stage_check import random_arguments
from tttc.errors import PassChangedMeaning
from tttc.ir import build as b
from tttc.ir.expr import Axis, Expr, leaf
from tttc.ir.gradient_class import classified
from tttc.ir.interpret import interpret
from tttc.ir.names import own, spelled
from tttc.ir.program import Assign, Block, DualProgram, For, cotangent
from tttc.ir.update import openings
from tttc.ir.verify import MalformedProgram, verify
from tttc.verification.comparison import GRADIENT_TOLERANCE, OUTPUT_TOLERANCE

compiler = import_module("tttc.compiler.pipeline")  # the attribute `tttc.compile` is the function
STAGES = tuple(stage.name for stage in compiler.PIPELINE if stage.name != "emit")
LOOPS = ("primal", "dualize", "schedule")  # the stages that hold the whole layer as one function
TOKENS = 10  # two mini-batches of 4, and one that ends early
every_variant = pytest.mark.parametrize("name", VARIANTS)
every_declaration = pytest.mark.parametrize("name", LIBRARY)  # each with its own read, anchor, steps and update
every_length = pytest.mark.parametrize("mini_batch", [4, "all"])


def executed(layer, stage):
    """The functions of a printed stage, run as a Python file."""
    scope = {"__name__": stage}
    exec(compile(str(layer.stages[stage]), f"<{stage}>", "exec"), scope)
    return scope


def one_head(inputs):
    """The inputs of the only batch element and head, as arrays by name."""
    sequences = {"q": inputs.q, "k": inputs.k, "v": inputs.v, **inputs.gates, **inputs.tokens}
    found = {n: x[0, :, 0] for n, x in sequences.items()}
    found |= {n: x[0] for n, x in inputs.params.items()} | {n: x[0, 0] for n, x in inputs.state.items()}
    return {n: x.detach().numpy().copy() for n, x in found.items()}


def called(scope, function, arguments):
    """A printed function on arrays by name; its results by name, as it is printed."""
    given = {n: arguments[n] for p in function.params for n in [spelled(p.name)]}
    results = scope[function.name](**given)
    results = results if isinstance(results, tuple) else (results,)
    return {spelled(r.name): x for r, x in zip(function.returns, results, strict=True)}


def error(found, wanted):
    """Relative in the Frobenius norm, as in `tttc.verify`; NaN and other shapes are infinitely wrong."""
    wanted = np.asarray(wanted.detach() if isinstance(wanted, torch.Tensor) else wanted)
    if np.shape(found) != wanted.shape or not np.isfinite(found).all():
        return np.inf
    return np.linalg.norm(found - wanted) / (np.linalg.norm(wanted) or 1.0)


# -- loops over tokens and chunks ---------------------------------------------------------------------------


def loop_errors(layer, inputs, stage):
    """The errors of the outputs and final weights of a printed loop, against the oracle."""
    wanted = oracle_result(layer.signature.variant, inputs)
    program = layer.stages[stage].program
    found = called(executed(layer, stage), program[program.name], one_head(inputs))
    assert set(found) == {"z", *wanted.final}
    errors = {n: error(found[n], w[0, 0]) for n, w in wanted.final.items()}
    return errors | {"z": error(found["z"], wanted.z[0, :, 0])}


@pytest.mark.parametrize("stage", LOOPS)
@pytest.mark.parametrize("read", READS)
@every_length
@every_variant
def test_a_loop_equals_the_oracle(name, mini_batch, read, stage):
    """Outputs and final weights, to the tolerance of `tttc.verify`."""
    layer = compiled(name, mini_batch=mini_batch, read=read)
    assert max(loop_errors(layer, inputs_for(layer, TOKENS), stage).values()) <= OUTPUT_TOLERANCE


@every_length
@every_declaration
def test_a_loop_of_the_library_equals_the_oracle(name, mini_batch):
    """The same, for rules with momentum, decay, stages, several steps: every stage that is a loop."""
    layer = compiled(name, 3, 4, mini_batch=mini_batch)
    inputs = inputs_for(layer, TOKENS)
    errors = {stage: max(loop_errors(layer, inputs, stage).values()) for stage in LOOPS}
    assert max(errors.values()) <= OUTPUT_TOLERANCE, errors


@every_length
@every_variant
def test_a_loop_over_no_tokens_returns_the_weights(name, mini_batch):
    layer = compiled(name, mini_batch=mini_batch)
    arguments = one_head(inputs_for(layer, 0))
    for stage in LOOPS:
        program = layer.stages[stage].program
        if mini_batch == "all" and stage != "primal":
            continue  # a single chunk of no tokens is no chunk; the layer does not run it
        found = called(executed(layer, stage), program[program.name], arguments)
        assert len(found.pop("z")) == 0
        for n, w in found.items():
            np.testing.assert_array_equal(w, arguments[n])


@pytest.mark.parametrize("read", READS)
@every_length
@every_variant
def test_the_adjoint_equals_the_gradients_of_the_oracle(name, mini_batch, read):
    """The printed reverse sweeps, one after the other; to the tolerance of `tttc.verify`."""
    assert not wrong_gradients(compiled(name, mini_batch=mini_batch, read=read))


@every_length
@every_declaration
def test_the_adjoint_of_the_library_equals_the_gradients_of_the_oracle(name, mini_batch):
    """The same through everything that a sequence carries beside its weights, and what it began with."""
    assert not wrong_gradients(compiled(name, 3, 4, mini_batch=mini_batch))


def wrong_gradients(layer):
    """The inputs whose gradients by the printed adjoints are not those of the oracle."""
    inputs = inputs_for(layer, TOKENS)
    cotangents = random_cotangents(layer, inputs)
    found = swept_back(layer, one_head(inputs), cotangents)
    wanted = oracle_gradients(layer, inputs, cotangents)
    return {
        n: e
        for n, g in wanted.items()
        if not (e := error(found.get(f"d{n}", np.zeros(g.shape)), g)) <= GRADIENT_TOLERANCE
    }


def random_cotangents(layer, inputs):
    generator = np.random.default_rng(3)
    made = {"dz": generator.standard_normal(inputs.q.shape[1:2] + inputs.v.shape[3:])}
    return made | {f"d{n}": generator.standard_normal(w.shape[2:]) for n, w in inputs.state.items()}


def oracle_gradients(layer, inputs, cotangents):
    wanted = oracle_result(layer.signature.variant, inputs)
    total = (wanted.z[0, :, 0] * torch.tensor(cotangents["dz"])).sum()
    total = total + sum((w[0, 0] * torch.tensor(cotangents[f"d{n}"])).sum() for n, w in wanted.final.items())
    named = inputs.named()
    found = torch.autograd.grad(total, list(named.values()), allow_unused=True, materialize_grads=True)
    sequences = {"q", "k", "v", *inputs.gates, *inputs.tokens}
    by_name = dict(zip(named, found, strict=True))
    return {n: g[0, :, 0] if n in sequences else g[0] if n in inputs.params else g[0, 0] for n, g in by_name.items()}


def swept_back(layer, arguments, cotangents):
    """The chain rule over the printed scans: what the sequence begins with, then its mini-batches; or, where they are
    tiled and the only one stays open, its tiles and then its end.
    """
    schedule, program = layer.stages["schedule"].program, layer.stages["adjoint"].program
    forward, backward = executed(layer, "schedule"), executed(layer, "adjoint")
    scans = {s.name.removeprefix(program.name): s for s in program.scans}
    order = [part for part in ("_begin", "", *(() if "" in scans else ("_open", "_close"))) if part in scans]
    values = arguments | {spelled(o.variable.name): opened(o, program) for o in openings(program.update)}
    gates = layer.signature.gates
    met = []
    for part in order:
        if part == "_close":  # the end of a mini-batch takes the gates of its last token
            values = values | {n: values[n][-1] for n in gates}
        met.append(values)
        if part != order[-1]:
            values = values | called(forward, schedule[scans[part].name], values)
    found = {
        spelled(cotangent(a.target).name): np.zeros_like(values[spelled(a.leaf.name)])
        for s in scans.values()
        if s.differentiated
        for a in s.updates
    } | cotangents
    for part, values in zip(reversed(order), reversed(met), strict=True):
        scan = scans[part]
        pulled = called(backward, program[f"{scan.name}_adjoint"], values | found)
        made = {spelled(cotangent(a.target).name) for a in scan.updates}
        for n, g in pulled.items():
            if part == "_close" and n[1:] in gates:
                g = np.append(np.zeros((TOKENS - 1, *np.shape(g))), [g], 0)
            found[n] = g if n in made or n not in found else found[n] + g
    return found


def opened(o, program):
    """A variable of an open mini-batch before its first token."""
    return np.full([program.dims[a.size] for a in o.variable.axes], o.begins)


# -- functions of one token ---------------------------------------------------------------------------------


def one_token(layer):
    """A random token: all that the per-token functions read, as arrays and as torch leaves."""
    arguments = one_head(inputs_for(layer, 1))
    sequences = {"q", "k", "v", *layer.signature.gates, *layer.signature.tokens}
    arrays = {n: x[0] if n in sequences else x for n, x in arguments.items()}
    return arrays, {n: torch.tensor(x, requires_grad=True) for n, x in arrays.items()}


def bound(layer, tensors):
    declared = layer.signature
    values = {n: tensors[n] for n in (*declared.states, *declared.params)}
    values |= {n: tensors[n] for n in declared.tokens if n not in ("q", "k", "v")}
    return declared.variant.bind(values | {a: tensors[g] for a, g in declared.attributes.items()})


@pytest.mark.parametrize("stage", ["declare", "differentiate", "simplify"])
@every_declaration
def test_the_functions_of_one_token(name, stage):
    """loss and output are the user's, gradient is what torch.autograd finds. 1e-13: a few dozen roundings on one
    token.
    """
    layer = compiled(name, 3, 4)
    arrays, tensors = one_token(layer)
    program, scope = layer.stages[stage].program, executed(layer, stage)
    user = bound(layer, tensors)
    loss = user.loss(tensors["k"], tensors["v"])
    states = {n: tensors[n] for n in layer.signature.states}
    wanted = {"z": user.output(tensors["q"]), "loss": loss}
    gradients = torch.autograd.grad(loss, list(states.values()), allow_unused=True, materialize_grads=True)
    wanted |= {f"d{n}": g for n, g in zip(states, gradients, strict=True)}
    found = {n: x for f in program.functions for n, x in called(scope, f, arrays).items()}
    assert set(found) == ({"z", "loss"} if stage == "declare" else {"z", *(f"d{n}" for n in states)})
    for n, x in found.items():
        assert error(x, wanted[n]) <= 1e-13, n


# -- the interpreter ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
@every_length
@every_variant
def test_the_interpreter_computes_what_the_text_does(name, mini_batch, stage):
    """1e-13: the same operations in NumPy, some as einsum and some as @."""
    assert not interpreted_otherwise(compiled(name, mini_batch=mini_batch), stage)


@every_length
@every_declaration
def test_the_interpreter_computes_what_the_text_of_the_library_does(name, mini_batch):
    layer = compiled(name, 3, 4, mini_batch=mini_batch)
    assert not {stage: wrong for stage in STAGES if (wrong := interpreted_otherwise(layer, stage))}


def interpreted_otherwise(layer, stage):
    """The results of the functions of a stage that the interpreter and the printed text do not agree about."""
    program, scope = layer.stages[stage].program, executed(layer, stage)
    wrong = {}
    for function in program.functions:
        arguments = random_arguments(function.params, program.dims, TOKENS)
        found = called(scope, function, {spelled(n): x for n, x in arguments.items()})
        for n, x in zip(found, interpret(program, function.name, arguments), strict=True):
            if not (e := error(found[n], x)) <= 1e-13:
                wrong[function.name, n] = e
    return wrong


def test_the_stages_are_those_of_the_pipeline():
    layer = compiled("TTTLinear")
    assert [entry.name for entry in layer.stages] == [*STAGES, "emit"]
    assert layer.source in str(layer.stages["emit"])
    with pytest.raises(KeyError, match="no stage 'dual'"):
        layer.stages["dual"]
    assert layer.stages.diff("primal", "dualize").startswith("--- primal\n+++ dualize\n")


@every_variant
def test_no_weights_of_a_single_token_after_dualize(name):
    """The point of the dual form: nothing in it has a token axis beside both axes of a weight matrix."""
    from tttc.ir.expr import postorder
    from tttc.ir.program import blocks

    program = compiled(name, D=16).stages["schedule"].program
    for function in program.functions:
        for block in blocks(function.body):
            for e in postorder(a.value for a in block.assigns):
                assert len(e.axes) <= 2, e


# -- a compiler that checks itself --------------------------------------------------------------------------


@pytest.mark.parametrize("mini_batch", MINI_BATCHES)
@pytest.mark.parametrize("read", READS)
@every_variant
def test_the_compiler_checks_its_own_passes(monkeypatch, name, read, mini_batch):
    monkeypatch.setenv("TTTC_CHECK", "1")
    variant = VARIANTS[name].replace(mini_batch=mini_batch, read=read)
    assert tttc.compile(variant, compiled(name).dims, torch.float64).stages["adjoint"]


@pytest.mark.parametrize(
    "mini_batch", [4, pytest.param("all", marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.slow)]
)
@every_declaration
def test_the_compiler_checks_its_own_passes_on_the_library(monkeypatch, name, mini_batch):
    monkeypatch.setenv("TTTC_CHECK", "1")
    variant = LIBRARY[name].replace(mini_batch=mini_batch)
    assert tttc.compile(variant, dims_of(variant, 3, 4), torch.float64).stages["adjoint"]


def halved(role):
    return lambda rule: replace(rule, **{role: {n: b.mul(b.const(0.5), r) for n, r in getattr(rule, role).items()}})


def changed(**settings):
    return lambda rule: replace(rule, **settings)


# What a stage may get wrong of an update rule, and a declaration that has it.
FAULTS = {
    "half the momentum": ("Titans", {}, halved("momentum")),
    "another momentum": ("Titans", {}, lambda rule: replace(rule, momentum=rule.decay, decay=rule.momentum)),
    "Nesterov's momentum": ("MomentumDeltaNet", {}, changed(nesterov=True)),
    "momentum of every token": ("LaCT", {}, changed(per="token")),
    "half the decay": ("GLA", {}, halved("decay")),
    "a decay that comes last": ("GatedDeltaNet", {}, changed(decay_first=False)),
    "no stage at the end": ("ViTTT", {}, changed(at_end=())),
    "a stage too few": ("LaCT", {}, lambda rule: replace(rule, at_end=rule.at_end[1:])),
    "no view": ("Moneta", {}, changed(at_end=())),
    "another anchor": ("DeltaNet", {}, changed(anchor="mini_batch")),
    "an anchor of its own": ("Titans", {}, changed(anchor="token")),
    "a step too few": ("MTTT", {}, changed(steps=1)),
    "half the average": ("DeltaNet", {"update": tttc.sgd(0.1, average=0.5)}, halved("average")),
    "no clip": ("TTTLinear", {"update": tttc.sgd(0.1, clip=0.1)}, changed(clip=None)),
    "half of tau": ("TTTLinear", {}, halved("tau")),
}


@pytest.mark.parametrize("stage", LOOPS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_pass_that_changes_the_rule_is_named(monkeypatch, fault, stage):
    """One stage takes another rule than the declared one, and says nothing about it."""
    name, settings, change = FAULTS[fault]
    monkeypatch.setenv("TTTC_CHECK", "1")

    def faulty(run):
        def wrong(p, o):
            other = replace(p, update=change(p.update))
            other = classified(other) if isinstance(other, DualProgram) else other
            return replace(run(other, o), update=p.update)

        return wrong

    stages = [replace(s, run=faulty(s.run)) if s.name == stage else s for s in compiler.PIPELINE]
    monkeypatch.setattr(compiler, "PIPELINE", tuple(stages))
    variant = LIBRARY[name].replace(mini_batch=4, **settings)
    with pytest.raises(PassChangedMeaning, match=f"stage '{stage}' changed the output"):
        tttc.compile(variant, dims_of(variant, 3, 4), torch.float64)


def with_stage(monkeypatch, name, change):
    """The pipeline with one stage whose result is changed by `change`."""
    stages = [
        replace(s, run=lambda p, o, run=s.run: change(run(p, o))) if s.name == name else s for s in compiler.PIPELINE
    ]
    monkeypatch.setattr(compiler, "PIPELINE", tuple(stages))


def doubled(program):
    """Every value that is assigned to `z` is twice what it should be."""

    def statement(s):
        if isinstance(s, For):
            return replace(s, body=tuple(map(statement, s.body)))
        if isinstance(s, Block):
            return Block(tuple(Assign(a.target, twice(a.value)) if a.leaf.name == own("z") else a for a in s.assigns))
        return s

    functions = tuple(replace(f, body=tuple(map(statement, f.body))) for f in program.functions)
    return replace(program, functions=functions)


def twice(e):
    return b.mul(b.const(2), e)


@pytest.mark.parametrize("stage", ["differentiate", "simplify", "primal", "dualize", "schedule"])
def test_a_pass_that_changes_a_value_is_named(monkeypatch, stage):
    monkeypatch.setenv("TTTC_CHECK", "1")
    with_stage(monkeypatch, stage, doubled)
    with pytest.raises(PassChangedMeaning, match=f"stage '{stage}' changed the output z"):
        tttc.compile(VARIANTS["TTTLinear"], {"D": 3}, torch.float64)


def test_a_pass_that_makes_nonsense_is_named_without_being_asked(monkeypatch):
    """Types and scopes are verified always."""
    with_stage(monkeypatch, "dualize", without_allocation)
    with pytest.raises(MalformedProgram, match="stage 'dualize'"):
        tttc.compile(VARIANTS["TTTLinear"], {"D": 3}, torch.float64)


def test_what_is_malformed_is_shown_down_to_a_few_operations():
    """The text of a value that is shared sixty times over is longer than any memory."""
    deep = leaf("k", "token")
    for _ in range(60):
        deep = Expr("add", (deep, deep), None)

    def assigning(program):
        whole = program.functions[0]
        wrong = Block((Assign(leaf("x", "sum", (Axis("d", "D"),)), deep),))
        return replace(program, functions=(replace(whole, params=(*whole.params, leaf("k", "token")), body=(wrong,)),))

    program = tttc.compile(VARIANTS["TTTLinear"], {"D": 3}, torch.float64).stages["declare"].program
    with pytest.raises(MalformedProgram, match=re.escape("x has axes [d] but is assigned add(add(")) as caught:
        verify(assigning(program))
    assert len(str(caught.value)) < 1000


def without_allocation(program):
    functions = tuple(replace(f, body=f.body[1:]) for f in program.functions)
    return replace(program, functions=functions)


# -- determinism --------------------------------------------------------------------------------------------

PRINT_ALL = """
import torch, tttc
from tests.helpers import READS, VARIANTS, dims_of
for variant in VARIANTS.values():
    for settings in ({}, {"mini_batch": "all", "read": "before"}, {"mini_batch": 200, "read": "end"}):
        layer = tttc.compile(variant.replace(**settings), dims_of(variant, 3), torch.float64)
        for entry in layer.stages:
            print(entry.name, "" if entry.name == "emit" else entry.program)
        print(layer.source)
"""


def test_the_text_is_the_same_in_every_process():
    """Names come from the declaration and from positions, never from hashes or counters."""
    root = Path(__file__).parents[1]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PRINT_ALL],
            cwd=root,
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(root)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in ("1", "2")
    ]
    one, other = (process.communicate()[0] for process in started)
    assert all(process.returncode == 0 for process in started)
    assert len(one) > 10_000
    assert one == other


def test_the_text_does_not_depend_on_what_was_compiled_before():
    first = tttc.compile(VARIANTS["TTTMLP"], {"D": 3, "F": 12}, torch.float64)
    tttc.compile(VARIANTS["GatedThreeLayer"], {"D": 3, "F": 12}, torch.float64)
    again = tttc.compile(VARIANTS["TTTMLP"], {"D": 3, "F": 12}, torch.float64)
    assert first.source == again.source
    for stage in STAGES:
        assert str(first.stages[stage].program) == str(again.stages[stage].program)


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_collection_is_as_it_was_before(enabled):
    """Also after a stage that fails, and where somebody had switched it off."""
    before = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        with gc_paused(), gc_paused():
            assert not gc.isenabled()
        assert gc.isenabled() == enabled
        with pytest.raises(KeyError), gc_paused():
            raise KeyError
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if before else gc.disable)()
