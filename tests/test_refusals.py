"""What has no exact form over a chunk is refused: with the line, the reason, and what to write instead."""

from __future__ import annotations

import pytest

import tttc
from tests.test_errors import GOLDEN, cases, refused
from tttc.errors import DeclarationError, NotDualizable


class Memory(tttc.Variant):
    """What the declarations below change in one place."""

    mini_batch = 4
    W = tttc.state("D", "D")
    b = tttc.state("D")

    def learner(self, x):
        return tttc.tanh(x @ self.W + self.b)

    def loss(self, k, v):
        return 0.5 * tttc.sum((self.learner(k) - v) ** 2)

    update = tttc.sgd(lr=tttc.gate("lr"))


class NonlinearInItsWeights(Memory):
    def learner(self, x):
        return x @ tttc.tanh(self.W) + self.b


class Adam(Memory):
    update = tttc.adam(lr=1e-3)


class SignDescent(Memory):
    update = tttc.sign_sgd(lr=1e-3)


class MuonOfEveryToken(Memory):
    update = tttc.muon()


class SoftmaxRetentionOfEveryToken(Memory):
    update = tttc.sgd(lr=1.0, at_end=tttc.softmax_retention())


class OnlineReadAtTheEnd(Memory):
    anchor, read = "token", "end"


class MuonOfAVector(Memory):
    read = "start"
    update = tttc.sgd(lr=1.0, at_end=tttc.muon())


class StageThatReduces(Memory):
    read = "start"
    update = tttc.sgd(lr=1.0, at_end=tttc.at_end(lambda U: tttc.sum(U)))


class StageForNothing(Memory):
    read = "start"
    update = tttc.sgd(lr=1.0, at_end=tttc.muon(states=("W", "V")))


class StageThatRaises(Memory):
    read = "start"
    update = tttc.sgd(lr=1.0, at_end=tttc.at_end(lambda U: U.nowhere))


class NesterovAlone(Memory):
    update = tttc.sgd(lr=1.0, nesterov=True)


class DecayFirstFrozen(Memory):
    update = tttc.sgd(lr=1.0, decay=0.9, decay_first=True)


class ScaleOnline(Memory):
    anchor = "token"
    update = tttc.sgd(lr=1.0, read_scale=tttc.gate("tau"))


class AverageOfWhatIsScaled(Memory):
    update = tttc.sgd(lr=1.0, read_scale=tttc.gate("tau"), average=0.1)


class AverageBeforeItBegins(Memory):
    read = "start"
    update = tttc.sgd(lr=1.0, average=0.1)


class MeanOfWhatIsToCome(Memory):
    update = tttc.sgd(lr=1.0, momentum=tttc.gate("momentum"), per="mini_batch")


class StepsWithMomentum(Memory):
    read, steps = "end", 2
    update = tttc.sgd(lr=1.0, momentum=0.9)


class StepsReadInside(Memory):
    steps = 2


class ClippedToNothing(Memory):
    update = tttc.sgd(lr=1.0, clip=0.0)


INEXACT = (
    NonlinearInItsWeights,
    Adam,
    SignDescent,
    MuonOfEveryToken,
    SoftmaxRetentionOfEveryToken,
    OnlineReadAtTheEnd,
)
CONTRADICTORY = (
    MuonOfAVector,
    StageThatReduces,
    StageForNothing,
    StageThatRaises,
    NesterovAlone,
    DecayFirstFrozen,
    ScaleOnline,
    AverageOfWhatIsScaled,
    AverageBeforeItBegins,
    MeanOfWhatIsToCome,
    StepsWithMomentum,
    StepsReadInside,
    ClippedToNothing,
)


def compiling(variant):
    return lambda: tttc.compile(variant, {"D": 3})


REFUSED = cases(
    **{v.__name__: (NotDualizable, compiling(v)) for v in INEXACT},
    **{v.__name__: (DeclarationError, compiling(v)) for v in CONTRADICTORY},
)


@pytest.mark.parametrize("case", REFUSED)
def test_a_rule_is_refused(case, golden):
    refused(case, golden, case.run, "refusals")


@pytest.mark.parametrize("variant", [*INEXACT, *CONTRADICTORY], ids=lambda v: v.__name__)
def test_check_says_the_same(variant):
    """`tttc.check` finds without sizes what `tttc.compile` refuses with them."""
    problems = tttc.check(variant)
    with pytest.raises(DeclarationError) as caught:
        tttc.compile(variant, {"D": 3})
    assert problems
    assert all(p.what in str(caught.value) and p.remedy in str(caught.value) for p in problems)


@pytest.mark.parametrize(
    "variant",
    [
        NonlinearInItsWeights.replace(read="start"),
        NonlinearInItsWeights.replace(mini_batch=1),
        Memory.replace(read="start", update=tttc.sgd(lr=1.0, at_end=tttc.muon(states=("W",)))),
        Memory.replace(read="end", update=tttc.sgd(lr=1.0, at_end=tttc.softmax_retention())),
        Memory.replace(update=tttc.sgd(lr=1.0, at_end=tttc.at_end(tttc.sign))),
        OnlineReadAtTheEnd.replace(read="after"),
        OnlineReadAtTheEnd.replace(anchor="mini_batch"),
    ],
)
def test_what_the_refusals_advise_compiles(variant):
    tttc.compile(variant, {"D": 3})


def test_every_golden_text_has_a_case():
    """A text that no case produces any more would be read by nobody."""
    names = {parameter.values[0].name for parameter in REFUSED}
    assert {path.stem for path in (GOLDEN / "refusals").glob("*.txt")} == names
