"""The toy backend registers itself, as one of a stranger's would."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.backends import toy
from tttc.backends.registry import Unit, register, unregister


@pytest.fixture(autouse=True, scope="package")
def toy_backend() -> Iterator[None]:
    register(Unit("toy", "NumPy, one head after the other", lambda: toy, ("cpu",)))
    yield
    unregister("toy")
