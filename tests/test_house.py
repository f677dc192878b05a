"""The structure of the sources stays within what tests/house.py allows."""

from __future__ import annotations

import pytest

from tests.house import FIGURES, LIMITS


@pytest.mark.parametrize("name", FIGURES)
def test_the_structure_is_within_its_limits(name):
    places = FIGURES[name]()
    assert len(places) <= LIMITS[name], "\n".join([f"{len(places)}, at most {LIMITS[name]}:", *places])
