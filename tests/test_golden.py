"""What every stage prints for every library variant, word for word: a changed text is reviewed like changed code."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import tttc
from tests.helpers import VARIANTS
from tttc.variant import signature
from tttc.verify import default_dims

STAGES = [*(stage.name for stage in tttc.PIPELINE), "emit"]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", VARIANTS)
def test_stage_text(name: str, stage: str, golden: Callable[[str, str], None]) -> None:
    """`--update-golden` accepts the new text."""
    variant = VARIANTS[name]
    layer = tttc.compile(variant, default_dims(signature(variant), 64))
    entry = layer.stages[stage]
    golden(f"{name}/{entry.number}_{stage}", str(entry.program) if entry.program else entry.text)
