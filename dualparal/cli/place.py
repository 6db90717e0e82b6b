"""The place of a job: number of stages, device and threads, from the flags and from a launcher's environment."""

from __future__ import annotations

import os


def leads() -> bool:
    """True in the parent of ranks, in the only process, and in the rank that will lead, before there is a mesh."""
    return os.environ.get("RANK", "0") == "0"


def parse_layers(text: str | None) -> tuple[int, ...] | None:
    """The numbers in ``--layers-per-stage``; None: not given. Raises ValueError."""
    if text is None:
        return None
    try:
        return tuple(int(count) for count in text.split(","))
    except ValueError:
        raise ValueError(
            f"--layers-per-stage {text!r}: use a number of layers for each stage, such as 9,11,10"
        ) from None


def count_stages(gpus: int | None, stages: int | None, device: str | None) -> int:
    """The number of stages, from the flags or from a launcher's environment, which knows the number of processes.

    Raises:
        ValueError: flags that contradict each other, the device or the environment.
    """
    if gpus is not None and stages is not None and gpus != stages:
        raise ValueError(f"--gpus {gpus} and --stages {stages}: one stage runs on one GPU; give one of them")
    if gpus is not None and device not in (None, "cuda"):
        raise ValueError(f"--gpus {gpus} with --device {device}: use --stages for the number of {device} processes")
    flag, count = ("--gpus", gpus) if stages is None else ("--stages", stages)
    if count is not None and count < 1:
        raise ValueError(f"{flag} {count}: every layer needs an owner; use 1 or more")
    if "RANK" not in os.environ:
        return count or 1
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if count not in (None, world_size):
        raise ValueError(
            f"{flag} {count} in a run of {world_size} processes: every process is one stage; leave {flag} out, "
            f"or start {count} processes"
        )
    return world_size


def choose_device(name: str | None, gpus: int | None) -> str:
    """The type of the device, "cuda" or "cpu": ``--device``, or what there is.

    Raises:
        ValueError: another name, or a GPU that torch does not see.
    """
    import torch

    if name not in (None, "cuda", "cpu"):
        raise ValueError(f"--device {name}: use cuda or cpu")
    if torch.cuda.is_available():
        return name or "cuda"
    if gpus is not None or name == "cuda":
        asked = "--device cuda" if gpus is None else f"--gpus {gpus}"
        raise ValueError(
            f"{asked}: torch sees no GPU; use --device cpu, with --stages for several processes, or install a CUDA "
            "build of torch ('dualparal doctor' says what is there)"
        )
    return "cpu"


def choose_threads(asked: int, stages: int) -> int:
    """CPU threads of each stage: the number asked for, or, for 0, a share of the cores. Raises ValueError."""
    if not 0 <= asked <= 4096:
        raise ValueError(f"--threads {asked}: use a number from 1, or 0 for the cores divided by the stages")
    return asked or max(1, (os.cpu_count() or 1) // stages)
