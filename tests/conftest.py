"""Fixtures: a tiny Wan2.1 and Wan2.2 model, an engine to ask, one thread so that cores do not fight."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dualparal.engine.engine import Engine
from dualparal.models.wan.tiny import build_tiny_pipeline
from places import GOLDEN

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--exhaustive", action="store_true", help="every case of what is else sampled")


@pytest.fixture
def exhaustive(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--exhaustive"))


@pytest.fixture(scope="session")
def wan21(tmp_path_factory: pytest.TempPathFactory) -> Path:
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
    return build_tiny_pipeline(tmp_path_factory.mktemp("models") / "wan21_9", layers=9)


@pytest.fixture(scope="session")
def wan22(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_pipeline(tmp_path_factory.mktemp("models") / "wan22", layers=4, wan22=True)


@pytest.fixture(scope="session")
def golden() -> Path:
    return GOLDEN


@pytest.fixture
def engine(wan21: Path) -> Callable[..., Engine]:
    """An engine of the tiny Wan2.1 model on the CPU."""

    def build(model: Any = None, **options: Any) -> Engine:
        return Engine.from_pretrained(model or wan21, device="cpu", **options)

    return build
