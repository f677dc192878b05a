"""The baselines: what the layer is timed against must be right, and what is wrong must be found."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from tttc.declare.read import signature
from tttc.declare.variant import Variant
from tttc.examples.demo.baselines import Eager, faults, mini_batch_step, random_workload, time_interleaved, time_limit
from tttc.library import TTTMLP, LinearAttention, TTTLinear
from tttc.reference import reference

DIMS = {"D": 4, "F": 6}


def workload(variant: type[Variant], tokens: int) -> Any:
    declared = signature(variant)

    def drawn(specs: Any) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(1)
        return {
            name: 0.5 * torch.randn([DIMS[dim] for dim in spec.dims], generator=generator)
            for name, spec in specs.items()
        }

    return random_workload(variant, drawn(declared.params), drawn(declared.states), DIMS, (2, tokens, 3))


@pytest.mark.parametrize("variant", [TTTLinear, TTTMLP, LinearAttention])
@pytest.mark.parametrize("tokens", [3, 16, 37])
def test_the_eager_program_is_the_definition(variant: type[Variant], tokens: int) -> None:
    exact = workload(variant, tokens).in_float64()
    z = exact.forward(Eager(variant))
    expected = exact.forward(lambda **arguments: reference(variant, **arguments))
    torch.testing.assert_close(z, expected, rtol=1e-10, atol=1e-10)


def test_a_wrong_implementation_is_named_with_its_error() -> None:
    right = Eager(TTTLinear)

    def wrong(**arguments: Any) -> Any:
        z, state = right(**arguments)
        return z * 1.01, state

    found = faults(TTTLinear, {"right": right, "wrong": wrong}, workload(TTTLinear, 20))
    assert list(found) == ["wrong"]
    assert "off by" in found["wrong"]


def test_nan_is_wrong() -> None:
    def nan(**arguments: Any) -> Any:
        return arguments["q"] * torch.nan, {}

    assert "nan" in faults(TTTLinear, {"nan": nan}, workload(TTTLinear, 4))["nan"]


def test_other_read_points_are_refused() -> None:
    with pytest.raises(ValueError, match="read='after'"):
        mini_batch_step(TTTLinear.replace(read="before"))


def test_every_implementation_runs_once_a_round() -> None:
    calls: list[str] = []

    def counting(name: str) -> Any:
        def run(**arguments: Any) -> Any:
            calls.append(name)
            return arguments["q"] * 2, {}

        return run

    times = time_interleaved({"a": counting("a"), "b": counting("b")}, workload(TTTLinear, 4), range(2))
    assert calls == ["a", "b", "a", "b"]
    assert all(forward > 0 and backward > 0 for forward, backward in times.values())


def test_the_time_limit_interrupts() -> None:
    with pytest.raises(TimeoutError, match="took more than 0 s"), time_limit(0.05):
        time.sleep(5)
    time.sleep(0.1)  # nothing rings later
