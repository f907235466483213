"""What holds for every test: no network, fixed seeds, a clean environment. torch is not imported here."""

from __future__ import annotations

import os
import random
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TOKENIZERS_PARALLELISM="false",
    COLUMNS="100",
    TERM="dumb",
)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads that wait for each other cost more than these models do
for name in ("FORCE_COLOR", "PY_COLORS", "CLICOLOR_FORCE", "GITHUB_ACTIONS", "HF_TOKEN"):
    os.environ.pop(name, None)


class NetworkClosed(ConnectionRefusedError):
    """A test tried to reach something that is not on this machine."""


def _close_network(event: str, args: tuple[Any, ...]) -> None:
    """Refuse every connection but those of AF_UNIX; an audit hook sees those of every Python library."""
    if event == "socket.getaddrinfo":
        raise NetworkClosed(f"tests have no network: {args[0]!r}")
    if event in ("socket.connect", "socket.sendto") and args[0].family != socket.AF_UNIX:
        raise NetworkClosed(f"tests have no network: {args[1]!r}")


def pytest_configure(config: pytest.Config) -> None:
    """Close the network once; an audit hook cannot be taken away."""
    if not getattr(sys, "_efficli_network_closed", False):
        sys.addaudithook(_close_network)
        sys._efficli_network_closed = True  # type: ignore[attr-defined]
    # No test reads or writes a person's own caches; set before any test module imports huggingface_hub.
    hub = tempfile.TemporaryDirectory(prefix="efficli-hf-home-")
    config.add_cleanup(hub.cleanup)
    os.environ["HF_HOME"] = hub.name
    steps = tempfile.TemporaryDirectory(prefix="efficli-cache-")
    config.add_cleanup(steps.cleanup)
    os.environ["EFFICLI_CACHE_DIR"] = steps.name


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none; torch is asked only if such a test was selected."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not _has_gpu():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def _has_gpu() -> bool:
    if not Path("/dev/nvidiactl").exists():
        return False
    import torch

    return torch.cuda.is_available()


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """The same random numbers for every test, in whatever order they run."""
    random.seed(0)
    np.random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
    yield


@pytest.fixture(autouse=True)
def _heard() -> Iterator[None]:
    """A command that was interrupted ignores further signals: the next test, and what it starts, must not."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
