"""The pack in the double, for whichever tests ask for it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.comfy.conftest import prepare
from tests.fake_comfy.double import Double


@pytest.fixture(scope="session")
def double(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Double]:
    base = tmp_path_factory.mktemp("double")
    with Double(base, prepare(base)) as running:
        yield running
