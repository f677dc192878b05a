"""What every stage prints for every library variant, word for word: a changed text is reviewed like changed code."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest

import tttc
from tests.helpers import LIBRARY
from tttc.declare.read import signature
from tttc.runtime.layer import Layer
from tttc.verification.comparison import default_dims

STAGES = [stage.name for stage in tttc.PIPELINE]


@cache
def compiled(name: str) -> Layer:
    """The variant as it is declared, with D = 64."""
    return tttc.compile(LIBRARY[name], default_dims(signature(LIBRARY[name]), 64))


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", LIBRARY)
def test_stage_text(name: str, stage: str, golden: Callable[[str, str], None]) -> None:
    """`--update-golden` accepts the new text."""
    entry = compiled(name).stages[stage]
    golden(f"{name}/{entry.number}_{stage}", entry.text)


def test_no_text_without_a_variant(request: pytest.FixtureRequest) -> None:
    """A variant that is renamed takes its texts along; folders in lower case are those of other tests."""
    folders = {path.name for path in (request.path.parent / "golden").iterdir()}
    assert {name for name in folders if name[0].isupper()} == set(LIBRARY)
