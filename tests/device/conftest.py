"""Everything of this folder is marked ``device``, and left out where nothing can be built."""

from __future__ import annotations

from pathlib import Path

import pytest

from device import base, building

FOLDER = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = building.missing()
    for item in items:
        if item.path.parent == FOLDER:
            item.add_marker(pytest.mark.device)
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def small_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base of all runs; the device is built before any of them, so that a failure is the compiler's message."""
    building.build()
    return base.write(tmp_path_factory.mktemp("device") / "base")
