"""The twin of the reference, calibrated on a few tokens, in this process."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.precision.here import Shop, drawn, in_this_process, open_shop

__all__ = ["in_this_process"]


@pytest.fixture(scope="session")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where results are kept."""
    return tmp_path_factory.mktemp("kept")


@pytest.fixture(scope="module")
def twin(kept: Path, in_this_process: None) -> Shop:
    """The twin's rows of 96 and 288 fill blocks of 32 only."""
    return open_shop("reference-twin", kept, drawn(1001, 8))
