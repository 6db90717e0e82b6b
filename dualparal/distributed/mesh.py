"""The rank of this process, and the meeting of ranks: by torchrun, by our supervisor, or one process alone.

One rank owns one stage, or several share it: those of stage s are s * P to s * P + P - 1. Nothing listens outside
loopback unless torchrun set it up so: ranks that our supervisor starts meet through a file in a private folder.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import os
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from dualparal.distributed import private
from dualparal.distributed.handshake import handshake
from dualparal.launch.heartbeat import RENDEZVOUS

JOIN_SECONDS = 120.0  # until the last rank of this machine has imported what it needs
TORCHRUN_JOIN = timedelta(minutes=10)  # the same of all machines, which may read one slow disk
TIMEOUT = timedelta(minutes=30)  # a rank may wait long for a slow neighbour; the supervisor watches progress

_groups: list[list[Any]] = []  # of every engine, also of those that live until the interpreter ends


@dataclass(frozen=True)
class Mesh:
    """This process among those of a run, and its role: a stage, all of them, or decoding alone.

    Attributes:
        rank: 0 .. world_size - 1.
        world_size: processes of the run.
        num_stages: stages of the whole run.
        device: this process's.
        distributed: more than one process; then each stage has its ranks, and those after them decode; else all of it
            lies here.
        places: ranks of each stage, P. In one process as many threads.
    """

    rank: int
    world_size: int
    num_stages: int
    device: torch.device
    distributed: bool
    places: int = 1

    @property
    def is_leader(self) -> bool:
        """True on the first rank of stage 0, which has latents, samplers, snapshots and the consumer."""
        return self.rank == 0

    @property
    def stage_ranks(self) -> int:
        """The number of ranks that have a stage or a place in one, N * P; those after them decode."""
        return self.num_stages * self.places

    @property
    def place(self) -> int:
        """The number of this rank among those of its stage."""
        return self.rank % self.places if self.distributed else 0

    def rank_of(self, place: int) -> int:
        """The rank of a place of the schedule: of a stage its first one, or one that only decodes."""
        n = self.num_stages
        return place * self.places if place < n else self.stage_ranks + place - n

    @property
    def schedule_place(self) -> int | None:
        """The inverse of ``rank_of`` for this rank; None: another place of its stage."""
        if self.rank >= self.stage_ranks:
            return self.num_stages + self.rank - self.stage_ranks
        return None if self.place else self.rank // self.places

    @property
    def team(self) -> range:
        """The ranks of this one's stage."""
        first = self.rank - self.place
        return range(first, first + self.places)

    @property
    def stages(self) -> range:
        """The stages of this process; none on a rank that only decodes."""
        stage = self.rank // self.places
        here = range(stage, stage + 1) if self.distributed else range(self.num_stages)
        return range(min(here.start, self.num_stages), min(here.stop, self.num_stages))

    @property
    def role(self) -> dict[str, int]:
        """The number of this rank among those of its role, by the role's name: "stage" or "decoder". Where a stage
        has several ranks, "place" is the number among these."""
        return role_of(self.rank, self.num_stages, self.places)

    @property
    def before(self) -> int:
        """The rank of the same place of the stage before this one's, which for stage 0 is the last."""
        return (self.rank - self.places) % self.stage_ranks

    @property
    def after(self) -> int:
        """The rank of the same place of the stage after this one's, which for the last is stage 0."""
        return (self.rank + self.places) % self.stage_ranks

    @classmethod
    def local(cls, device: torch.device, num_stages: int = 1, places: int = 1) -> Mesh:
        """The mesh of a run in this process alone, which owns all stages."""
        return cls(0, 1, num_stages, device, False, places)

    @classmethod
    def join(cls, device_type: str, decode_ranks: int = 0, places: int = 1) -> Mesh:
        """Joins the process group that the environment describes, or uses the one that is there.

        Args:
            device_type: "cuda" (the card is the local rank's) or "cpu".
            decode_ranks: the last ranks, which only decode; each of the others has a stage.
            places: ranks that share a stage, P.

        Raises:
            ValueError: no rank is left for a stage, or the ranks do not make whole stages.
            RuntimeError: CUDA asked for and this rank has no card, or a process group is there that has no CPU.
            TimeoutError: another rank did not come.
        """
        world_size = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
        if decode_ranks >= world_size:
            raise ValueError(
                f"decode_ranks={decode_ranks} in a run of {world_size} ranks: a stage needs one, too; use "
                f"{world_size - 1} at most, or start more ranks"
            )
        if (world_size - decode_ranks) % places:
            raise ValueError(
                f"sequence_parallel={places} with {world_size - decode_ranks} ranks for stages: each stage takes "
                f"{places}; start a multiple of that, and {decode_ranks} more for decode_ranks"
            )
        if device_type == "cuda":
            local_rank = int(os.environ.get("LOCAL_RANK", "0"))
            if local_rank >= torch.cuda.device_count():
                raise RuntimeError(
                    f"local rank {local_rank} has no GPU: {torch.cuda.device_count()} visible; "
                    "start as many ranks as there are cards"
                )
            torch.cuda.set_device(local_rank)
            device = torch.device("cuda", local_rank)
        else:
            device = torch.device(device_type)
        if not dist.is_initialized():
            cls._init()
        elif dist.get_backend() != private.NAME and "cpu" not in {
            device.type for device in dist.distributed_c10d._get_default_group()._device_types
        }:
            raise RuntimeError(
                f"the process group that is there ({dist.get_backend()}) sends nothing from the CPU: make it with "
                "init_process_group('cpu:gloo,cuda:nccl'), or leave it to dualparal"
            )
        stages = (world_size - decode_ranks) // places
        return cls(dist.get_rank(), world_size, stages, device, world_size > 1, places)

    def clock_offset(self) -> float:
        """Seconds to add to this rank's ``time.perf_counter`` to have rank 0's. Collective.

        On one machine it is the same clock, and the offset is 0. Between machines it is measured, by the quickest of
        some round trips to rank 0, and right within half of that one's time.
        """
        found = 0.0
        clock = torch.zeros(1, dtype=torch.float64)
        for other in range(1, self.world_size):
            if self.rank not in (0, other):
                continue
            quickest = float("inf")
            for _ in range(8):
                if self.is_leader:
                    dist.recv(clock, other)
                    clock[0] = time.perf_counter()
                    dist.send(clock, other)
                    continue
                begin = time.perf_counter()
                dist.send(clock, 0)
                dist.recv(clock, 0)
                end = time.perf_counter()
                if end - begin < quickest:
                    quickest, offset = end - begin, clock.item() - (begin + end) / 2
                    found = offset if abs(offset) > quickest / 2 else 0.0  # a clock that fits as it is, is shared
        return found

    @staticmethod
    def _init() -> None:
        """Makes the group of all ranks, by the supervisor's file if there is one, else by torchrun's variables.

        What goes to all ranks is small and on the CPU: by gloo, or by sockets that only this user can reach. Tensors
        have groups of their own (``remote``).
        """
        # Its functions take the group of all ranks as a default argument. Imported later (transformers does) they would
        # hold it, and with it gloo's threads, beyond the end of Python.
        importlib.import_module("torch.distributed.nn.functional")
        atexit.register(_leave)
        path = os.environ.get(RENDEZVOUS)
        if path is None:
            store, rank, world_size = next(dist.rendezvous("env://", timeout=TORCHRUN_JOIN))
            store.set_timeout(TIMEOUT)
            # torchrun's store outlives the ranks that it restarts, and with it the addresses of dead ones.
            store = dist.PrefixStore(f"dualparal/attempt/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
            _say_who_is_missing(store, rank, world_size, TORCHRUN_JOIN.total_seconds())
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=TIMEOUT)
            return
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(variable, "lo0" if os.uname().sysname == "Darwin" else "lo")
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        store = dist.FileStore(path, world_size)
        _say_who_is_missing(store, rank, world_size, JOIN_SECONDS)
        private.register()
        dist.init_process_group(private.NAME, store=store, rank=rank, world_size=world_size, timeout=TIMEOUT)


def _say_who_is_missing(store: Any, rank: int, world_size: int, seconds: float) -> None:
    """Waits for all ranks. torch would wait for one that never comes for as long as for a slow one, and not say which.

    Raises TimeoutError, ValueError.
    """
    handshake(dist.PrefixStore("dualparal/join", store), rank, world_size, {}, seconds)


def own_store() -> Any:
    """A connection of its own to where the ranks meet, for another thread."""
    store: Any = dist.distributed_c10d._get_default_store()
    return store.clone() if hasattr(store, "clone") else store


def drop_at_exit(groups: list[Any]) -> None:
    """Empties this list of process groups when the process ends: its owner may live until after that."""
    _groups.append(groups)


def _leave() -> None:
    """Ends all process groups, and with them gloo's threads, while Python is whole."""
    for groups in _groups:
        groups.clear()
    gc.collect()  # the edges of past runs hold them too, in cycles
    if dist.is_initialized():
        dist.destroy_process_group()


def role_of(rank: int, stages: int, places: int) -> dict[str, int]:
    """The role of a rank as its number by name, see ``Mesh.role``."""
    if rank >= stages * places:
        return {"decoder": rank - stages * places}
    stage, place = divmod(rank, places)
    return {"stage": stage, "place": place} if places > 1 else {"stage": stage}


def in_distributed_run() -> bool:
    """True when this process is one rank of several (torchrun, our supervisor, or a process group that is there)."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size() > 1
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ
