"""dualparal: long video from a stock video diffusion transformer, split over GPUs, frames as it runs.

Names are loaded when they are first used, so that importing the package needs neither torch nor a GPU.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dualparal import from_source
from dualparal.version import __version__

if TYPE_CHECKING:
    from dualparal.checkpoint.checkpointer import Checkpoint
    from dualparal.config.blocks import BlockConfig
    from dualparal.config.eight_bit import EightBitPolicy, LinearPolicy
    from dualparal.config.engine import EngineConfig
    from dualparal.config.lora import Lora
    from dualparal.config.reuse import Reuse
    from dualparal.config.video import VideoConfig
    from dualparal.decoding.chunks import Chunk
    from dualparal.engine.result import EngineOutput
    from dualparal.hosts.enabled import disable, enable
    from dualparal.hosts.modular import DualParalDecode, DualParalDenoise
    from dualparal.planning.plan import Plan
    from dualparal.planning.planner import plan
    from dualparal.schedule.schedule import Schedule
    from dualparal.workers.engine import Engine
    from dualparal.workers.ranks import RankFailed

from_source.register()

_EXPORTS = {
    "BlockConfig": "config.blocks",
    "Checkpoint": "checkpoint.checkpointer",
    "Chunk": "decoding.chunks",
    "DualParalDecode": "hosts.modular",
    "DualParalDenoise": "hosts.modular",
    "EightBitPolicy": "config.eight_bit",
    "Engine": "workers.engine",
    "EngineConfig": "config.engine",
    "EngineOutput": "engine.result",
    "LinearPolicy": "config.eight_bit",
    "Lora": "config.lora",
    "Plan": "planning.plan",
    "RankFailed": "workers.ranks",
    "Reuse": "config.reuse",
    "Schedule": "schedule.schedule",
    "disable": "hosts.enabled",
    "enable": "hosts.enabled",
    "plan": "planning.planner",
    "VideoConfig": "config.video",
}
__all__ = [
    "BlockConfig",
    "Checkpoint",
    "Chunk",
    "DualParalDecode",
    "DualParalDenoise",
    "EightBitPolicy",
    "Engine",
    "EngineConfig",
    "EngineOutput",
    "LinearPolicy",
    "Lora",
    "Plan",
    "RankFailed",
    "Reuse",
    "Schedule",
    "VideoConfig",
    "__version__",
    "disable",
    "enable",
    "plan",
]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(f"dualparal.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module 'dualparal' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
