"""What the compiler does once, what its history keeps, and which rule it blames."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

import tttc
from tests.helpers import LIBRARY, VARIANTS, dims_of
from tttc.backends import registry
from tttc.compiler import pipeline
from tttc.declare import user_functions
from tttc.errors import PassChangedMeaning
from tttc.ir import build as b
from tttc.ir import gradient_class, simplify
from tttc.ir.rewrite import Rule

# -- once --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def runs(monkeypatch):
    """How often each stage runs."""
    counted: Counter[str] = Counter()

    def counting(stage):
        def run(program, options):
            counted[stage.name] += 1
            return stage.run(program, options)

        return replace(stage, run=run)

    monkeypatch.setattr(pipeline, "PIPELINE", tuple(map(counting, pipeline.PIPELINE)))
    return counted


def refusing(unit):
    """A backend that refuses every program."""

    class Refusing:
        def __getattr__(self, name):
            return getattr(unit.backend, name)

        def refusals(self, program):
            return ["not today"]

    return replace(unit, loader=Refusing)


def test_what_comes_before_the_schedule_runs_once_whatever_auto_refuses(monkeypatch, runs):
    monkeypatch.delenv("TTTC_BACKEND")
    (runs_on_all,) = (u for u in registry.units() if not u.devices)
    first, second = (replace(refusing(runs_on_all), name=n, devices=("cpu",), auto=("cpu",)) for n in ("one", "two"))
    monkeypatch.setattr(registry, "_units", [first, second, runs_on_all])
    with pytest.warns(tttc.FallbackWarning, match="not today"):
        layer = tttc.compile(VARIANTS["TTTLinear"], {"D": 3})
    assert layer.backend == runs_on_all.name
    early = ("declare", "differentiate", "simplify", "primal", "dualize")
    assert runs == dict.fromkeys(early, 1) | {"schedule": 3, "adjoint": 3, "emit": 1}


@pytest.mark.parametrize("name", ["TTTMLP", "DeltaNet", "GLA"])
def test_the_functions_are_traced_once_and_the_gradients_classified_once(monkeypatch, name):
    """Traced twice, for the second run shows whether the first left something behind."""
    counted: Counter[str] = Counter()

    def counting(module, function):
        original = getattr(module, function)

        def counted_one(*arguments, **settings):
            counted[f"{function} {arguments[0]}" if isinstance(arguments[0], str) else function] += 1
            return original(*arguments, **settings)

        monkeypatch.setattr(module, function, counted_one)

    counting(user_functions, "run_twice")
    counting(gradient_class, "gradient_class")
    tttc.compile(LIBRARY[name], dims_of(LIBRARY[name], 3, 4), torch.float64)
    assert counted == {"run_twice loss": 1, "run_twice output": 1, "gradient_class": 1}


# -- which rule it was -------------------------------------------------------------------------------------------------

WRONG = Rule("tanh(x) -> x", lambda e: e.src[0] if e.op == "tanh" else None, ("tanh",))


class Tanh(tttc.Variant):
    mini_batch = 4
    W = tttc.state("D", "D", init=tttc.normal(0.5))

    def learner(self, x):
        return tttc.tanh(x @ self.W)

    def loss(self, k, v):
        return 0.5 * tttc.sum((self.learner(k) - v) ** 2)

    update = tttc.sgd(lr=tttc.gate("lr"))


def test_the_rule_that_changes_a_value_is_named(monkeypatch):
    monkeypatch.setenv("TTTC_CHECK", "1")
    monkeypatch.setattr(simplify, "RULES", (*simplify.RULES, WRONG))
    with pytest.raises(PassChangedMeaning, match="stage 'simplify' changed the output") as caught:
        tttc.compile(Tanh, {"D": 3})
    assert 'the rule "tanh(x) -> x" did: ' in str(caught.value).splitlines()[1]


def test_no_rule_is_blamed_for_what_the_stage_itself_does(monkeypatch):
    monkeypatch.setenv("TTTC_CHECK", "1")

    def doubled(program):
        function = program["output"]
        ((assign,),) = (block.assigns for block in function.body)
        twice = replace(assign, value=b.mul(b.const(2), assign.value))
        body = (replace(function.body[0], assigns=(twice,)),)
        others = tuple(f for f in program.functions if f is not function)
        return replace(program, functions=(*others, replace(function, body=body)))

    stages = [
        replace(s, run=lambda p, o, run=s.run: doubled(run(p, o))) if s.name == "simplify" else s
        for s in pipeline.PIPELINE
    ]
    monkeypatch.setattr(pipeline, "PIPELINE", tuple(stages))
    with pytest.raises(PassChangedMeaning) as caught:
        tttc.compile(Tanh, {"D": 3})
    assert "the rule" not in str(caught.value).split("---")[0]


def test_the_history_keeps_the_rules_that_fired(capsys, monkeypatch):
    monkeypatch.setenv("TTTC_DEBUG", "2")
    layer = tttc.compile(Tanh, {"D": 3})
    fired = layer.stages["simplify"].fired
    titles = {rule.title for rule in (*simplify.RULES, *simplify.FINISHING)}
    assert fired
    assert set(fired) <= titles
    assert not layer.stages["declare"].fired
    title, count = next(iter(fired.items()))
    assert f"{count:20}  {title}\n" in capsys.readouterr().err
