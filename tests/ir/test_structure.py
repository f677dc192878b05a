"""The digest of a declaration: one for all that mean the same, another for everything else."""

from __future__ import annotations

import pytest
import torch

import tttc
from tttc.ir.program import TokenProgram
from tttc.ir.structure import digest
from tttc.library import TTTLinear


class Alike(TTTLinear):
    """The same by another name."""


def of(variant: type[tttc.Variant] = TTTLinear, dims: int = 4, **settings: object) -> str:
    return digest(tttc.compile(variant, {"D": dims}, backend="torch", **settings).stages.of(TokenProgram))


def test_it_is_that_of_the_declaration_alone():
    settings = ({}, {"dtype": torch.float64}, {"telemetry": True}, {"decode": "rows"})
    assert {of(Alike), *(of(**s) for s in settings)} == {of()}


def test_it_is_the_same_in_every_process_and_version():
    """Files hold it: where it changes, so must their format."""
    assert of() == "13819cc5cd41ba021e511434c3872475d2f614a5a241b6dd6c989b958d6f86ae"


@pytest.mark.parametrize("changed", [{"mini_batch": 8}, {"read": "before"}, {"update": tttc.sgd(lr=0.5)}])
def test_another_rule_has_another(changed):
    assert of(TTTLinear.replace(**changed)) != of()


def test_other_sizes_have_another():
    assert of(dims=5) != of()
