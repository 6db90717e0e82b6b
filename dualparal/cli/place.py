"""The place of a job: number of stages, device and threads, from the flags and from a launcher's environment."""

from __future__ import annotations

import contextlib
import os

from dualparal.config.transformer_file import TransformerFile
from dualparal.models.registry import BUILT_IN, BUILT_IN_FOLDER, model_sizes

_COLUMNS = 128  # of hidden states that a thread has to have


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


def count_stages(gpus: int | None, stages: int | None, device: str | None, decoders: int = 0, places: int = 1) -> int:
    """The number of stages, from the flags or from a launcher's environment, which knows the number of processes.

    Args:
        gpus: all cards of the run.
        stages: their number, as the flag has it.
        device: as the flag has it.
        decoders: cards or processes that only decode.
        places: cards or processes of each stage.

    Raises:
        ValueError: flags that contradict each other, the device or the environment.
    """
    if decoders < 0:
        raise ValueError(f"--decode-gpus {decoders}: use the number of GPUs that only decode, 0 for none")
    if places < 1:
        raise ValueError(f"--sequence-parallel {places}: use the number of GPUs or processes of each stage, from 1 on")
    if gpus is not None and stages is not None and gpus != stages * places + decoders:
        if decoders or places > 1:
            others = f" --decode-gpus {decoders}" * (decoders > 0) + f" --sequence-parallel {places}" * (places > 1)
            raise ValueError(
                f"--gpus {gpus} and --stages {stages} with{others}: --gpus counts all of them; leave --stages out"
            )
        raise ValueError(f"--gpus {gpus} and --stages {stages}: one stage runs on one GPU; give one of them")
    if gpus is not None and device not in (None, "cuda"):
        raise ValueError(f"--gpus {gpus} with --device {device}: use --stages for the number of {device} processes")
    if gpus is not None and 0 < gpus <= decoders:
        raise ValueError(
            f"--decode-gpus {decoders} of --gpus {gpus}: the stages need one, too; use {gpus - 1} at most, or more GPUs"
        )
    flag, count = ("--gpus", gpus) if stages is None else ("--stages", stages)
    if count is not None and count < 1:
        raise ValueError(f"{flag} {count}: every layer needs an owner; use 1 or more")
    if gpus is not None and count is not None:
        count = _whole_stages(f"--gpus {gpus}", gpus, decoders, places)
    if "RANK" not in os.environ:
        return count or 1
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if decoders >= world_size:
        raise ValueError(
            f"--decode-gpus {decoders} in a run of {world_size} processes: the stages need one, too; start more"
        )
    here = _whole_stages(f"a run of {world_size} processes", world_size, decoders, places)
    if count not in (None, here):
        given = gpus if stages is None else stages
        what = f"{decoders} decode and every other process" if decoders else "every process"
        is_ = "is one stage" if places == 1 else f"shares a stage with {places - 1}"
        raise ValueError(
            f"{flag} {given} in a run of {world_size} processes: {what} {is_}; leave {flag} out, "
            f"or start {(count or 0) * places + decoders} processes"
        )
    return here


def _whole_stages(what: str, total: int, decoders: int, places: int) -> int:
    """The number of stages of ``total`` cards or processes. Raises ValueError when a stage would lack some."""
    stages, left = divmod(total - decoders, places)
    if left or not stages:
        raise ValueError(
            f"--sequence-parallel {places} with {total - decoders} for the stages of {what}: every stage takes "
            f"{places}; use a multiple of that"
        )
    return stages


def choose_device(name: str | None, gpus: int | None) -> str:
    """The type of the device, "cuda" or "cpu": ``--device``, or what there is.

    Raises:
        ValueError: another name, or a GPU that torch does not see.
    """
    if name not in (None, "cuda", "cpu"):
        raise ValueError(f"--device {name}: use cuda or cpu")
    if name == "cpu" and gpus is None:
        return name
    import torch

    if torch.cuda.is_available():
        return name or "cuda"
    if gpus is not None or name == "cuda":
        asked = "--device cuda" if gpus is None else f"--gpus {gpus}"
        raise ValueError(
            f"{asked}: torch sees no GPU; use --device cpu, with --stages for several processes, or install a CUDA "
            "build of torch ('dualparal doctor' says what is there)"
        )
    return "cpu"


def choose_threads(
    asked: int, stages: int, model: str | None = None, transformers: tuple[TransformerFile, ...] = ()
) -> int:
    """CPU threads of each stage: the number asked for, or, for 0, ``OMP_NUM_THREADS``, or a share of the cores.

    Of the cores that this process may use, one for each ``_COLUMNS`` of the model's hidden states at most: the threads
    of small products wait for each other longer than they work, and on a busy machine very much longer.

    Args:
        asked: the flag's value.
        stages: of the run, and processes that decode.
        model: as the flag has it; None, or one whose sizes are not known here: taken for a large one.
        transformers: files in place of its transformers.

    Raises:
        ValueError: a number that is none of threads.
    """
    if not 0 <= asked <= 4096:
        raise ValueError(f"--threads {asked}: use a number from 1, or 0 for the cores over the processes")
    if asked:
        return asked
    given = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()  # a list is one number per level of nesting
    if given.isdecimal() and 1 <= int(given) <= 4096:
        return int(given)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    most = cores
    if model is not None:
        with contextlib.suppress(ValueError, OSError):
            name = str(BUILT_IN_FOLDER) if model == BUILT_IN else model
            most = model_sizes(name, transformers).inner // _COLUMNS
    return max(1, min(cores // stages, most))
