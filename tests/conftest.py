"""Markers, seeds, and the folders that tests read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from marlin_gptq.kernel import set_overlap

ROOT = Path(__file__).resolve().parents[1]
# The larger checkpoints and texts lie beside the checkout (or, where a machine was sent a copy, inside it).
SHARED_DATA = [ROOT.parent / "shared" / "data", ROOT / "shared" / "data"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    no_gpu = pytest.mark.skip(reason="needs an NVIDIA GPU (torch.cuda.is_available() is False)")
    not_asked = pytest.mark.skip(reason="slow: run with --slow")
    gpu = torch.cuda.is_available()
    for item in items:
        if "gpu" in item.keywords and not gpu:
            item.add_marker(no_gpu)
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(not_asked)


# The cores of this process, of those that pytest-xdist runs side by side.
CORES = max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))


def pytest_configure() -> None:
    # The matrices here are small, and threads that wait for one another crawl on a machine with other work.
    torch.set_num_threads(1)
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.environ.setdefault("OMP_NUM_THREADS", str(CORES))  # of the processes that tests start


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test starts from the same random state, whichever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """Slow tests run whole models and get all cores of this process."""
    if request.node.get_closest_marker("slow"):
        torch.set_num_threads(CORES)
    yield
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _overlap() -> Iterator[None]:
    """Loading a model on a GPU lets kernels overlap; the next test begins without."""
    yield
    set_overlap(False)


@pytest.fixture(autouse=True)
def _hub_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test asks the network whether the hub is there."""
    for module in ("text_sources", "cli.harness_options"):
        monkeypatch.setattr(f"marlin_gptq.{module}.hub_silence", lambda: "")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of checkpoints and texts too large to commit; without it the tests that ask are skipped."""
    for folder in SHARED_DATA:
        if folder.is_dir():
            return folder
    pytest.skip("needs the data folder beside the checkout (../shared/data)")


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def tiny_llama() -> Path:
    """The committed 5.5 M-parameter checkpoint: fp16, 4 blocks, hidden 256, tied embeddings."""
    return ROOT / "examples" / "tiny-llama"
