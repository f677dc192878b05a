"""The structure of the sources stays within what tests/house.py allows."""

from __future__ import annotations

import ast

import pytest

from tests.house import FIGURES, LIMITS, imports, sources
from tttc.backends.registry import units


@pytest.mark.parametrize("name", FIGURES)
def test_the_structure_is_within_its_limits(name):
    places = FIGURES[name]()
    assert len(places) <= LIMITS[name], "\n".join([f"{len(places)}, at most {LIMITS[name]}:", *places])


def test_a_module_that_is_imported_when_it_is_asked_for_is_imported():
    """Or a circle through the registry would not be one."""
    tree = sources()["backends/registry.py"]
    found = {name for name, node in imports(tree, "tttc.backends.registry") if isinstance(node, ast.Call)}
    assert {u.backend.__name__ for u in units() if u.backend.__name__.startswith("tttc.")} <= found
