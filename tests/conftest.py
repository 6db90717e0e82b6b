"""Fixtures: a tiny Wan2.1 and Wan2.2 model, an engine to ask, one thread so that cores do not fight.

torch is imported late here, so that ``make quick`` never pays for it.
"""

from __future__ import annotations

import gc
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

from places import GOLDEN

if TYPE_CHECKING:
    from dualparal.engine.engine import Engine

settings.register_profile("shared", deadline=None)  # a slow machine is no failure
settings.load_profile("shared")

if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # under nohup, which what tests start would inherit
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# What `make quick` runs: files that import neither torch nor diffusers and start no ranks, and of these the tests that
# ask for no model and are not marked `slow`.
QUICK = {
    "test_architecture.py",
    "test_config.py",
    "test_eight_bit.py",
    "test_plan.py",
    "test_schedule.py",
}
MODELS = {"wan21", "wan21_9_layers", "wan22", "engine"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--exhaustive", action="store_true", help="every case of what is else sampled")
    parser.addoption("--quick", action="store_true", help="only what needs neither torch nor a model")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    unwanted = config.getoption("--quick") and collection_path.is_file() and collection_path.name not in QUICK
    return True if unwanted else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--quick"):
        unwanted = [i for i in items if i.get_closest_marker("slow") or MODELS & set(getattr(i, "fixturenames", ()))]
        _leave_out(config, items, unwanted)
    if not config.getoption("--exhaustive"):
        _leave_out(config, items, _beyond_the_sample(items))


def _beyond_the_sample(items: list[pytest.Item]) -> list[pytest.Item]:
    """Of the cases of each test that is marked `sampled(n)` all but the first, the n-th after it, and so on."""
    seen: Counter[tuple[Path, str]] = Counter()
    unwanted = []
    for item in items:
        if (marker := item.get_closest_marker("sampled")) is not None:
            test = item.path, getattr(item, "originalname", item.name)
            if seen[test] % marker.args[0]:
                unwanted.append(item)
            seen[test] += 1
    return unwanted


def _leave_out(config: pytest.Config, items: list[pytest.Item], unwanted: list[pytest.Item]) -> None:
    config.hook.pytest_deselected(items=unwanted)
    gone = set(unwanted)
    items[:] = [item for item in items if item not in gone]


@pytest.fixture(scope="session", autouse=True)
def _one_thread(request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("--quick"):
        import torch

        torch.set_num_threads(1)


@pytest.fixture
def exhaustive(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--exhaustive"))


@pytest.fixture(scope="session")
def wan21(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from dualparal.models.wan.tiny import build_tiny_pipeline

    path = build_tiny_pipeline(tmp_path_factory.mktemp("models") / "wan21", layers=4)
    # Every engine collects garbage once it has encoded its prompts. Among the hundred thousands of objects of torch,
    # diffusers and transformers that took half the time of a tiny video: they stay, so take them out of the search.
    from diffusers import WanPipeline  # noqa: F401
    from transformers import UMT5EncoderModel  # noqa: F401

    gc.collect()
    gc.freeze()
    return path


@pytest.fixture(scope="session")
def wan21_9_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from dualparal.models.wan.tiny import build_tiny_pipeline

    return build_tiny_pipeline(tmp_path_factory.mktemp("models") / "wan21_9", layers=9)


@pytest.fixture(scope="session")
def wan22(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from dualparal.models.wan.tiny import build_tiny_pipeline

    return build_tiny_pipeline(tmp_path_factory.mktemp("models") / "wan22", layers=4, wan22=True)


@pytest.fixture(scope="session")
def golden() -> Path:
    return GOLDEN


@pytest.fixture
def engine(wan21: Path) -> Callable[..., Engine]:
    """An engine of the tiny Wan2.1 model on the CPU."""
    from dualparal.engine.engine import Engine

    def build(model: Any = None, **options: Any) -> Engine:
        return Engine.from_pretrained(model or wan21, device="cpu", **options)

    return build
