"""What every test of the project shares: the real data sets, and hypothesis' settings."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

# Two busy cores make single examples slow by chance, and a deadline then fails by chance.
settings.register_profile("sottovoce", deadline=None)
settings.load_profile("sottovoce")

_VARIABLE = "SOTTOVOCE_DATA"


def pytest_configure() -> None:
    """Refuse a wrong setting at once: skipping what was meant to run would look like success."""
    folder = os.environ.get(_VARIABLE)
    if folder and not Path(folder).is_dir():
        raise pytest.UsageError(f"{_VARIABLE}={folder} is not a folder: name that of the real data sets, or unset it")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `shared_data` where no folder is named: the only skips that the project allows."""
    if os.environ.get(_VARIABLE):
        return
    skip = pytest.mark.skip(reason=f"shared_data: set {_VARIABLE} to the folder of the real data sets")
    for item in items:
        if item.get_closest_marker("shared_data") is not None:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of the real data sets; only for tests marked `shared_data`."""
    return Path(os.environ[_VARIABLE])
