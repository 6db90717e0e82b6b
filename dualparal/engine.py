"""The public engine: a model, cut into stages, that makes long videos of blocks in flight.

It checks a request, loads what this rank owns, builds the schedule, the stages and the edges between them, and
walks the schedule while finished blocks are decoded beside it. The one file that knows everybody.
"""

from __future__ import annotations

import contextlib
import json
import logging
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist

import dualparal
from dualparal import capacity, snapshot
from dualparal.checkpoint import Checkpoint, Checkpointer, check_fits, needed
from dualparal.config.blocks import BlockConfig
from dualparal.config.eight_bit import OFF, EightBitPolicy
from dualparal.config.video import OutputType, VideoConfig
from dualparal.cost import Workload
from dualparal.decode import StreamingDecoder
from dualparal.executor import LatentQueue, NonFiniteError, StageExecutor, StepCallback, run_together
from dualparal.graphs import Graphed, cuda_capture
from dualparal.handshake import gather, handshake
from dualparal.kernels import attention_8bit as kernels_8bit
from dualparal.lane import Chunk, DecodeLane
from dualparal.loading import LoadedPipeline, ModelFiles, ModelSource, resolve_model
from dualparal.mesh import TIMEOUT, Mesh, drop_at_exit, in_distributed_run
from dualparal.model_shape import model_shape
from dualparal.models.base import Slice
from dualparal.noise import BlockNoise
from dualparal.request import Prompt, Request, check_request, split_videos
from dualparal.schedule.actions import Unit
from dualparal.schedule.layout import split_layers
from dualparal.schedule.schedule import Schedule
from dualparal.snapshot import Snapshot, SnapshotError
from dualparal.stage import Forward, Stage
from dualparal.text import PromptEncoder, Prompts
from dualparal.timeline import Recorder, check_name, merge_left, prepare
from dualparal.trace import BusyClock, RankStats, RunStats, schedule_bubble
from dualparal.transport import (
    Inbound,
    LocalEdge,
    Outbound,
    PromptChannel,
    ReceiveEdge,
    SendEdge,
    make_groups,
    warm_up,
)

logger = logging.getLogger("dualparal")

HANDSHAKE_SECONDS = 60.0
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_runs = count()


@dataclass(frozen=True)
class Resumed:
    """A snapshot that a run goes on from, and the name of its file."""

    snapshot: Snapshot
    name: str


@dataclass(frozen=True)
class EngineOutput:
    """``frames`` as WanPipeline returns them, with an axis of videos in front; None on ranks other than 0."""

    frames: Any
    stats: RunStats | None


class Engine:
    """Makes long videos from a stock Wan text-to-video model. Build one with ``from_pretrained``.

    In one process it runs ``stages`` stages in turn; in a distributed run (torchrun, ``dualparal generate``) every
    rank builds the same engine, makes the same calls and owns one stage, and rank 0 gets the video.
    """

    def __init__(
        self,
        source: ModelSource,
        blocks: BlockConfig,
        layers: Sequence[range],
        mesh: Mesh,
        dtype: torch.dtype,
        depth: int = 2,
        graphs: bool = False,
        report: Callable[..., None] | None = None,
        attention_8bit: EightBitPolicy = OFF,
        allow_nonfinite: bool = False,
    ) -> None:
        self.source = source
        self.blocks = blocks
        self.layers = layers  # of each stage
        self.num_stages = len(layers)
        self.mesh = mesh
        self.dtype = dtype
        self.depth = depth
        self.graphs = graphs
        self.report = report
        self.attention_8bit = attention_8bit
        self.allow_nonfinite = allow_nonfinite
        self.scheduler: Any = source.load_scheduler()  # diffusers' name; assign another one as in diffusers
        self.stats: RunStats | None = None  # of the last run, on rank 0
        self._encoder = PromptEncoder(lambda: source.load_text_encoder(mesh.device, dtype), mesh.device)
        self._slices: dict[int, list[Slice]] = {}
        self._vae: Any = None
        self._groups: list[Any] | None = None
        self._store: Any = None  # of the run, where its ranks meet
        self._prompts: list[Prompts] = []  # of the videos that run, on rank 0
        self._requests: list[Request] = []
        self._interrupted = False
        self._running = False

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | Any,
        *,
        frames_per_block: int = 8,
        context_frames: int = 4,
        context: str = "cached",
        max_blocks_in_flight: int | None = None,
        context_version: str = "matching",
        refresh_every: int | None = None,
        stages: int | None = None,
        layers_per_stage: Sequence[int] | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        depth: int = 2,
        graphs: bool = False,
        attention_8bit: str | EightBitPolicy = "off",
        report: Callable[..., None] | None = None,
        allow_nonfinite: bool = False,
    ) -> Engine:
        """An engine for a model. Weights are read at the first request, and then only this rank's.

        Args:
            model: a directory in diffusers format, a hub id, or a loaded WanPipeline.
            frames_per_block: B, latent frames per block (Num_B in the paper).
            context_frames: C, latent frames lent by each neighbour (half of the paper's Num_C).
            context: "cached", "prior" or "paper": where a block's view of its neighbours comes from.
            max_blocks_in_flight: K. Blocks enter ceil(T / K) iterations apart, and neighbours are so many steps apart:
                the first frames come earlier, at another video. Default: T, a block per iteration.
            context_version: with ``cached`` and such a gap, which features of the previous block are read: those of
                exactly the same step ("matching"), or the last ones made ("newest"), which take K slots and not T.
            refresh_every: R. Every R iterations a block sees its predecessor as with ``paper``, and nothing of what
                iterations before have left: another video, (B + C) / B the work at these iterations, and what
                ``cached`` and ``prior`` need for snapshots. Default: never.
            stages: into how many runs of layers the model is cut. Default: the number of ranks.
            layers_per_stage: how many layers each stage owns, for cards that are not alike. Default: an even split.
            device: default "cuda" where there is one, else "cpu".
            dtype: of the transformer; default bfloat16 on CUDA, float32 on the CPU. The VAE runs in float32.
            depth: messages that fit between two stages.
            graphs: run each stage step as a CUDA graph; the same bits, less work for the host.
            attention_8bit: "int8" (queries and keys of self-attention), "fp8" (values and weights besides), or an
                ``EightBitPolicy``, which can leave layers and steps out; with a dtype of 16 bits. Another video, near
                that of "off"; the same for any number of stages.
            report: called with (phase, block=, step=, stage=) before every action; for supervisors. At the first unit
                of an iteration besides with iteration= and busy=, seconds per layer spent in units so far.
            allow_nonfinite: give out blocks that hold NaN or infinity, with a warning, and do not stop.

        Raises:
            ValueError: bad values, or a model that is not supported (``ModelError``), before weights are read.
        """
        blocks = BlockConfig(
            frames_per_block,
            context_frames,
            context,  # type: ignore[arg-type]
            max_blocks_in_flight,
            context_version,  # type: ignore[arg-type]
            refresh_every,
        )
        if not isinstance(depth, int) or depth < 1:
            raise ValueError(
                f"depth={depth!r}: at least one message must fit between two stages; 2 lets transfers overlap compute"
            )
        eight_bit = attention_8bit
        if not isinstance(eight_bit, EightBitPolicy):
            eight_bit = EightBitPolicy(eight_bit)  # type: ignore[arg-type]
        source: ModelSource
        if isinstance(model, (str, Path)):
            source = resolve_model(model)
        else:
            source = LoadedPipeline(model)
        kind = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if kind.type == "cuda" and not torch.cuda.is_available():
            raise ValueError("device='cuda' but torch sees no GPU; use device='cpu', or install a CUDA build of torch")
        if graphs and kind.type != "cuda":
            raise ValueError(f"graphs=True with device={kind.type!r}: CUDA graphs need a GPU; leave graphs out")
        if isinstance(dtype, str):
            if dtype not in _DTYPES:
                raise ValueError(f"dtype={dtype!r} is not supported; use one of {', '.join(_DTYPES)}")
            dtype = _DTYPES[dtype]
        dtype = dtype or (torch.bfloat16 if kind.type == "cuda" else torch.float32)
        if in_distributed_run():
            mesh = Mesh.join(kind.type)
            if stages is not None and stages != mesh.world_size:
                raise ValueError(
                    f"stages={stages} with {mesh.world_size} ranks: in a distributed run every "
                    f"rank owns one stage; leave stages out or start {stages} ranks"
                )
            stages = mesh.world_size
        else:
            mesh = Mesh.local(kind)
            if stages is None:
                stages = 1 if layers_per_stage is None else len(layers_per_stage)
        layers = split_layers(source.spec.num_layers, stages, layers_per_stage)
        if eight_bit.on:
            _check_8bit(eight_bit, source, mesh.device, dtype)
        if isinstance(source, ModelFiles):
            source.check_weights()
        return cls(source, blocks, layers, mesh, dtype, depth, graphs, report, eight_bit, allow_nonfinite)

    # Requests -----------------------------------------------------------------------------------------------

    def __call__(self, prompt: Prompt | Sequence[Prompt] | None = None, **kwargs: Any) -> EngineOutput:
        """Whole videos at once. Arguments as ``stream``, with ``num_frames`` 81 by default, and ``return_dict``.

        ``output_type`` "np", "pt", "pil" or "latent" as in diffusers: ``frames`` is [V, F, H, W, 3],
        [V, F, 3, H, W], a list of V lists, or latents [V, C, L, h, w]; V is 1 unless there are several prompts.
        """
        return_dict = kwargs.pop("return_dict", True)
        if kwargs.get("num_frames", 81) is None:
            raise ValueError("num_frames=None is an endless video: use engine.stream(...)")
        kwargs.setdefault("keeps", "latents" if kwargs.get("output_type") == "latent" else "frames")
        chunks = list(self.stream(prompt, **kwargs))
        frames = _whole(chunks, kwargs.get("output_type", "np")) if chunks else None
        return EngineOutput(frames, self.stats) if return_dict else (frames,)  # type: ignore[return-value]

    def stream(
        self,
        prompt: Prompt | Sequence[Prompt] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        height: int = 480,
        width: int = 832,
        num_frames: int | None = 81,
        num_inference_steps: int = 50,
        guidance_scale: float = 5.0,
        guidance_scale_2: float | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        output_type: OutputType = "np",
        callback_on_step_end: Callable[..., dict[str, Any] | None] | None = None,
        max_sequence_length: int = 512,
        *,
        seed: int | Sequence[int] | None = None,
        timeline: str | Path | None = None,
        checkpoint: str | Path | Checkpoint | None = None,
        keeps: Literal["frames", "latents"] | None = None,
    ) -> Iterator[Chunk]:
        """Yields every block as soon as it is finished. The request is checked before this returns.

        Arguments and meanings are ``WanPipeline.__call__``'s, and besides:

        Args:
            prompt: a text, or {first frame: text}: blocks from that frame on take it. A list of these (or rows of
                ``prompt_embeds``): so many independent videos, whose units take turns; ``chunk.video`` says whose it
                is, and each has the bits that it has alone. ``negative_prompt``, ``seed``, ``generator`` may then be
                lists, and ``latents`` and embeddings have a row for each.
            num_frames: None for an endless video; stop by closing the iterator or calling ``interrupt``.
            seed: of the noise (default 0), in video v of several seed + v; or give a ``generator``, from which one is
                drawn for each.
            latents: initial noise [V, C, L, h, w] instead of the seed's.
            callback_on_step_end: called on rank 0 as (engine, step, timestep, {"latents", "block", "video"}) after
                every step of every block; a returned dict's "latents" replace them.
            timeline: a .json or .json.gz file for a trace of the run (ui.perfetto.dev opens it), replaced if it is
                there; the same on all ranks. It is whole when the stream has ended; what ranks on other nodes, or a
                distributed run that failed, left is in ``FILE.parts``, for ``dualparal.timeline.merge``.
            checkpoint: a folder for snapshots (or a ``Checkpoint``), from which ``resume`` goes on after whatever
                happens; the same on all ranks, written by rank 0. A snapshot counts a block as finished when the
                next chunk has been asked for. With ``cached`` and ``prior`` the engine needs ``refresh_every``.
            keeps: what of all chunks the caller will have in memory at the end, on the CPU. It counts when the request
                is checked against the memory there is.

        Raises:
            ValueError: a request that cannot be run; names the value, the rule and the way out.
        """
        requests = []
        for own in split_videos(
            prompt, negative_prompt, seed, generator, latents, prompt_embeds, negative_prompt_embeds
        ):
            video = VideoConfig(
                height,
                width,
                num_frames,
                num_inference_steps,
                float(guidance_scale),
                guidance_scale_2,
                own.pop("seed"),
                output_type,
                max_sequence_length,
            )
            request = check_request(self.source, self.scheduler, self.blocks, self.mesh.device, video, **own)
            requests.append(replace(request, callback=callback_on_step_end))
        self._check_capacity(requests, keeps)
        if checkpoint is not None:
            checkpoint = checkpoint if isinstance(checkpoint, Checkpoint) else Checkpoint(Path(checkpoint))
            self._check_checkpoint(requests)
            if self.mesh.rank == 0:
                snapshot.prepare(checkpoint.folder)
        return self._begin(requests, timeline, checkpoint)

    def resume(
        self,
        checkpoint: str | Path | Checkpoint,
        *,
        callback_on_step_end: Callable[..., dict[str, Any] | None] | None = None,
        timeline: str | Path | None = None,
    ) -> Iterator[Chunk]:
        """Goes on with a run from its last snapshot, on any number of stages, and keeps on writing snapshots there.

        The request is the snapshot's, prompts included; the text encoder is not loaded. The engine must have the
        model, blocks, dtype, 8-bit attention and sampler of that run. Chunks come from the first block that the
        snapshot does not count as finished, with the bits of an unbroken run on cards of the same type with the same
        torch; a block that had been given out already comes again.

        Raises:
            SnapshotError: no snapshot that can be used, or one of another model or another engine.
        """
        checkpoint = checkpoint if isinstance(checkpoint, Checkpoint) else Checkpoint(Path(checkpoint))
        found, name = snapshot.newest(checkpoint.folder)
        checkpoint = replace(checkpoint, notes=found.run.get("notes", {}))
        try:
            self._check_same_run(found)
            requests = self._requests_of(found, checkpoint.folder)
        except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
            raise SnapshotError(f"{name} does not describe a run ({error!r})") from None
        requests = [replace(request, callback=callback_on_step_end) for request in requests]
        self._check_checkpoint(requests)
        grid, spec = requests[0].grid, self.source.spec
        schedule = self._schedule(requests, found.iteration)
        shape = spec.in_channels, grid.height, grid.width
        check_fits(found, schedule, requests[0].layout, requests[0].sampler, shape, spec.text_dim)
        self._check_capacity(requests, None)
        return self._begin(requests, timeline, checkpoint, Resumed(found, name))

    def _requests_of(self, found: Snapshot, folder: Path) -> list[Request]:
        """Of every video in a snapshot."""
        noise = found.run["noise"]
        latents = None if noise is None else snapshot.read_noise(folder, noise)
        requests = []
        for number, (fields, prompts) in enumerate(zip(found.run["videos"], found.prompts, strict=True)):
            rows = prompts[min(prompts)]
            request = check_request(
                self.source,
                self.scheduler,
                self.blocks,
                self.mesh.device,
                VideoConfig(**fields),
                prompt=None,
                negative_prompt=None,
                latents=None if latents is None else latents[number : number + 1],
                prompt_embeds=rows[:1],
                negative_prompt_embeds=rows[1:] if len(rows) > 1 else None,
            )
            requests.append(request)
        if len({replace(request.video, seed=0) for request in requests}) != 1:
            raise SnapshotError("a snapshot of videos that are not alike")
        return requests

    def _begin(
        self,
        requests: list[Request],
        timeline: str | Path | None,
        checkpoint: Checkpoint | None,
        resumed: Resumed | None = None,
    ) -> Iterator[Chunk]:
        self.attention_8bit.check_steps(len(requests[0].sampler))
        if self._running:
            raise RuntimeError(
                "this engine is making a video: exhaust or close that stream first, give all prompts in one call, or "
                "use another engine"
            )
        if timeline is not None:
            timeline = Path(timeline)
            check_name(timeline)
        self._interrupted = False
        return self._run(requests, timeline, checkpoint, resumed)

    def _check_checkpoint(self, requests: list[Request]) -> None:
        """Raises ValueError when there is no iteration at which a snapshot could be taken."""
        if not any(map(self._schedule(requests).is_restartable, range(1, 1 + max(1, self.blocks.refresh_every or 1)))):
            raise ValueError(
                f"checkpoint with context={self.blocks.context!r}"
                + (", attention_8bit" if self.attention_8bit.on else "")
                + " and no refresh_every: what blocks in flight left behind is too large to keep; give the engine "
                "refresh_every, such as half the steps, or use context='paper' without 8-bit attention"
            )

    def _description(self, requests: list[Request], noise: str | None, notes: Mapping[str, Any]) -> dict[str, Any]:
        """What a snapshot says about its run."""
        return {
            "videos": [asdict(request.video) for request in requests],
            "noise": noise,
            "notes": dict(notes),
            "same": self._identity(),
            "made_with": self._versions(),
        }

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a run to go on."""
        config = self.scheduler.config
        return {
            "weights": self.source.fingerprint,
            "blocks": asdict(self.blocks),
            "dtype": str(self.dtype),
            "attention_8bit": asdict(self.attention_8bit),
            "sampler": type(self.scheduler).__name__,
            "sampler_config": {k: v for k, v in sorted(config.items()) if isinstance(v, (bool, int, float, str))},
        }

    def _versions(self) -> dict[str, str]:
        """What decides bits besides: without it the run goes on, and its frames may differ from an unbroken run's."""
        import diffusers

        card = torch.cuda.get_device_name(self.mesh.device) if self.mesh.device.type == "cuda" else platform.machine()
        versions = {"dualparal": dualparal.__version__, "torch": torch.__version__, "diffusers": diffusers.__version__}
        return {**versions, "device": f"{self.mesh.device.type} {card}"}

    def _check_same_run(self, found: Snapshot) -> None:
        """Raises SnapshotError when the engine is not of the snapshot's kind; warns where only bits may differ."""
        wanted = found.run["same"]
        have = json.loads(json.dumps(self._identity()))
        different = [f"{k}: {wanted.get(k)!r} there, {have[k]!r} here" for k in have if have[k] != wanted.get(k)]
        if different:
            raise SnapshotError("the snapshot is of another run: " + "; ".join(different))
        for key, value in self._versions().items():
            if found.run["made_with"].get(key) != value:
                logger.warning(
                    "resumed with %s %s, begun with %s: frames may differ in the last bits from an unbroken run's",
                    key,
                    value,
                    found.run["made_with"].get(key),
                )

    def _check_capacity(self, requests: list[Request], keeps: Literal["frames", "latents"] | None) -> None:
        """Raises ValueError for a request that cannot fit. A pipeline in memory has no config files to count from."""
        if not isinstance(self.source, ModelFiles):
            return
        video = requests[0].video
        decode = video.output_type != "latent"
        shape = model_shape(str(self.source.path))
        work = Workload(
            shape, video, self.blocks, self.dtype.itemsize, decode, self.depth, len(requests), self.attention_8bit.on
        )
        split = [len(layers) for layers in self.layers]
        held = len(requests) * capacity.whole_bytes(work, video.output_type, keeps) if self.mesh.rank == 0 else 0
        encodes = requests[0].embeds is None
        capacity.check(work, split, self._owned_stages(), self.mesh.device, encodes, held)

    def set_prompt(self, prompt: str, negative_prompt: str | None = None, *, video: int = 0) -> int:
        """Changes a video's prompt while it runs: blocks in flight keep theirs, new ones take this. Rank 0 only.

        negative_prompt None keeps the current one. Returns the first block that takes the new prompt.
        """
        if not self._prompts:
            raise RuntimeError("set_prompt: no video is running; give the prompt to stream()")
        if not 0 <= video < len(self._prompts):
            raise ValueError(f"video={video}: {len(self._prompts)} are running, counted from 0")
        request = self._requests[video]
        embeds = self._encoder.encode(
            prompt,
            negative_prompt or request.negative_prompt,
            request.video.guidance,
            request.video.max_sequence_length,
        )
        return self._prompts[video].change(embeds)

    @property
    def interrupted(self) -> bool:
        """Whether the last video was ended early by ``interrupt``."""
        return self._interrupted

    def interrupt(self) -> None:
        """Ends the running videos after the unit under way; finished blocks are still given out. Signal-safe."""
        self._interrupted = True

    # A run --------------------------------------------------------------------------------------------------

    def _run(
        self,
        requests: list[Request],
        timeline: Path | None,
        checkpoint: Checkpoint | None,
        resumed: Resumed | None,
    ) -> Iterator[Chunk]:
        schedule = self._schedule(requests, 0 if resumed is None else resumed.snapshot.iteration)
        self._meet(requests, schedule, timeline, resumed)
        self._requests = requests
        if self.mesh.rank == 0:
            self._prompts = self._encode() if resumed is None else [Prompts(dict(p)) for p in resumed.snapshot.prompts]
        self._load()
        lane: DecodeLane | None = None
        keeper: Checkpointer | None = None
        recorder, clocks = self._clocks(timeline)
        finished = False
        try:
            if self.mesh.rank == 0:
                lane = self._lane(requests, clocks[0])
                if checkpoint is not None:
                    keeper = self._keeper(checkpoint, requests, schedule, lane, resumed)
            executors = self._executors(requests, schedule, lane, clocks, keeper)
            if resumed is not None and lane is not None and checkpoint is not None:
                self._restore(executors[0].queues, lane, checkpoint.folder, resumed.snapshot, schedule)
            started = time.perf_counter()
            self._running = True
            for _ in run_together(executors):
                if lane is not None:
                    yield from _given_out(lane.ready(), keeper)
                    if self._interrupted:
                        self._stop(executors)
                        break
            self._running = False
            if lane is not None:
                yield from _given_out(lane.drain(), keeper)
            if keeper is not None:
                keeper.close()
            self._finish(clocks, lane, started, schedule)
            finished = True
        except NonFiniteError:
            assert lane is not None  # stage 0 has found it
            yield from lane.drain()  # blocks finished before are whole
            raise
        except GeneratorExit:  # the consumer has had enough
            if self._running:
                self._stop(executors)
            self._finish(clocks, lane, started, schedule)
            finished = True
            raise
        finally:
            if lane is not None:
                lane.close()
            if keeper is not None:
                with contextlib.suppress(
                    Exception
                ):  # after a run to its end it is closed; else what ended it says more
                    keeper.close()
            if recorder is not None:
                self._close(recorder, clocks, finished)
            self._prompts, self._requests = [], []
            self._running = False

    def _clocks(self, timeline: Path | None) -> tuple[Recorder | None, list[BusyClock]]:
        """A clock per stage here, and this rank's part of the timeline that they write, if one is wanted."""
        device, owned = self.mesh.device, self._owned_stages()
        if timeline is None:
            return None, [BusyClock(device) for _ in owned]
        if self.mesh.rank == 0:
            prepare(timeline)
        # Ranks other than 0 come out of here later than rank 0 went in: the folder for their parts is ready.
        offset = self.mesh.clock_offset() if self.mesh.distributed else 0.0
        recorder = Recorder(timeline, self.mesh.rank, self.mesh.world_size, offset)
        return recorder, [BusyClock(device, recorder.track(index, self.num_stages)) for index in owned]

    def _close(self, recorder: Recorder, clocks: list[BusyClock], finished: bool) -> None:
        """Joins the parts of the timeline, unless the run failed and other ranks may still be writing theirs."""
        for clock in clocks:
            with contextlib.suppress(RuntimeError):  # a device in error has no more to tell
                clock.settle()
        recorder.close()
        if self.mesh.rank == 0 and (finished or not self.mesh.distributed):
            merge_left(recorder.path)

    def _stop(self, executors: list[StageExecutor]) -> None:
        if self.mesh.distributed and self.mesh.rank == 0:
            executors[0].stop()

    def _lane(self, requests: list[Request], clock: BusyClock) -> DecodeLane:
        video = requests[0].video
        return DecodeLane(
            requests[0].layout,
            video.output_type,
            video.num_frames,
            int(self.source.vae_config.get("scale_factor_temporal", 4)),
            len(requests),
            None if video.output_type == "latent" else [StreamingDecoder(self.vae()) for _ in requests],
            self.mesh.device,
            lambda: clock.seconds,
            clock.track,
        )

    def _keeper(
        self,
        checkpoint: Checkpoint,
        requests: list[Request],
        schedule: Schedule,
        lane: DecodeLane,
        resumed: Resumed | None,
    ) -> Checkpointer:
        given = [request.latents for request in requests if request.latents is not None]
        if resumed is not None:
            run = {**resumed.snapshot.run, "made_with": self._versions()}
        else:
            noise = snapshot.write_noise(checkpoint.folder, torch.cat(given)) if given else None
            run = self._description(requests, noise, checkpoint.notes)
        keeper = Checkpointer(
            checkpoint,
            run,
            schedule,
            requests[0].layout,
            lane.history,
            lambda: [prompts.state() for prompts in self._prompts],
            self.mesh.device,
            "" if resumed is None else resumed.name,
        )
        if resumed is None:
            keeper.begin()
        return keeper

    @staticmethod
    def _restore(
        queues: Sequence[LatentQueue], lane: DecodeLane, folder: Path, found: Snapshot, schedule: Schedule
    ) -> None:
        """Latents and samplers as in the snapshot, and the decoders as far as they see back."""
        first = schedule.first_block
        before = [
            snapshot.read_blocks(folder, video, needed(queue.layout, first, lane.history))
            for video, queue in enumerate(queues)
        ]
        for queue, blocks, latents in zip(queues, found.blocks, before, strict=True):
            queue.restore(blocks, latents[-1] if latents else None)
        lane.resume(first, before)

    def _schedule(self, requests: list[Request], start: int = 0) -> Schedule:
        request = requests[0]
        return Schedule.of(
            self.blocks,
            num_stages=self.num_stages,
            num_steps=len(request.sampler),
            num_blocks=request.layout.num_blocks,
            guidance=request.video.guidance,
            decode=request.video.output_type != "latent",
            depth=self.depth,
            num_videos=len(requests),
            key_means=self.attention_8bit.on,
            start=start,
        )

    def _meet(
        self, requests: list[Request], schedule: Schedule, timeline: Path | None, resumed: Resumed | None
    ) -> None:
        """All ranks of a distributed run compare what they are about to do, before any tensor travels."""
        if not self.mesh.distributed:
            return
        import diffusers

        info = {
            "dualparal": dualparal.__version__,
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "world_size": self.mesh.world_size,
            "device": self.mesh.device.type,
            "dtype": str(self.dtype),
            "weights": self.source.fingerprint,
            "sampler": type(self.scheduler).__name__,
            "schedule": asdict(schedule),
            "video": {k: v for k, v in asdict(requests[0].video).items() if k not in ("output_type", "seed")},
            "seeds": [request.video.seed for request in requests],
            "frames_per_block": self.blocks.frames_per_block,
            "layers_per_stage": [len(layers) for layers in self.layers],
            "attention_8bit": asdict(self.attention_8bit),
            "timeline": timeline and str(timeline),
            "snapshot": resumed and resumed.name,
        }
        self._store = dist.PrefixStore(f"dualparal/{next(_runs)}", dist.distributed_c10d._get_default_store())
        handshake(self._store, self.mesh.rank, self.mesh.world_size, info, HANDSHAKE_SECONDS)
        if self._groups is None:
            self._groups = make_groups(self.mesh.world_size)
            drop_at_exit(self._groups)
            warm_up(self._groups, self.mesh.rank, self.mesh.device)

    def _encode(self) -> list[Prompts]:
        found = []
        for request in self._requests:
            video = request.video
            embeds = {} if request.embeds is None else {0: request.embeds}
            for block, text in request.prompts.items():
                embeds[block] = self._encoder.encode(
                    text, request.negative_prompt, video.guidance, video.max_sequence_length
                )
            found.append(Prompts(embeds))
        self._encoder.free()
        return found

    def _owned_stages(self) -> list[int]:
        return [self.mesh.rank] if self.mesh.distributed else list(range(self.num_stages))

    def _load(self) -> None:
        for index in self._owned_stages():
            if index not in self._slices:
                self._slices[index] = self.source.load_slices(self.layers[index], self.dtype, self.mesh.device)

    def vae(self) -> Any:
        """The VAE, loaded at first use."""
        if self._vae is None:
            self._vae = self.source.load_vae(self.mesh.device)
        return self._vae

    def _executors(
        self,
        requests: list[Request],
        schedule: Schedule,
        lane: DecodeLane | None,
        clocks: list[BusyClock],
        keeper: Checkpointer | None,
    ) -> list[StageExecutor]:
        request = requests[0]  # what follows is the same in all of them
        layout, grid, spec = request.layout, request.grid, self.source.spec
        owned = self._owned_stages()
        inbound, outbound = self._edges(schedule, request) if self.num_stages > 1 else ({}, {})
        # Ranks other than 0 have not seen the prompt: shape and dtype of the embeddings follow from the request.
        tokens = request.video.max_sequence_length if request.embeds is None else request.embeds.shape[1]
        channel = PromptChannel(
            (schedule.branches, tokens, spec.text_dim),
            self.dtype,
            self.mesh.rank,
            self.mesh.world_size,
            local_readers=self.num_stages - 1,
        )
        experts = [spec.expert(float(t), request.sampler.num_train_timesteps) for t in request.sampler.timesteps]
        lent = self.blocks.context_frames * grid.tokens
        slots = {side: schedule.slots(side) for side in ("head", "tail")}
        if self.attention_8bit.on:
            slots["mean"] = schedule.places
        # Who lends is a whole block; the head lies behind what is fed in front of it.
        starts = {
            "head": layout.fed_context(1) * grid.tokens,
            "tail": self.blocks.frames_per_block * grid.tokens - lent,
        }
        result = []
        for index, clock in zip(owned, clocks, strict=True):
            stage = Stage(
                self._slices[index],
                experts,
                request.sampler.timesteps,
                slots,
                schedule.branches,
                grid,
                layout.max_window_frames * grid.tokens,
                lent,
                starts,
                first=index == 0,
                last=index == self.num_stages - 1,
                layers=self.layers[index],
                eight_bit=self.attention_8bit,
                refreshes=schedule.refresh_every is not None,
                wrap=self._graphed if self.graphs else None,
            )
            queues = [self._queue(video, schedule, experts) for video in range(len(requests))] if index == 0 else ()
            result.append(
                StageExecutor(
                    schedule,
                    layout,
                    index,
                    stage,
                    inbound.get(index),
                    outbound.get(index),
                    channel,
                    clock,
                    queues,
                    on_emit=partial(self._emit, lane, keeper) if lane else None,
                    on_decode=lane.decode if lane else None,
                    on_cut=partial(self._cut, keeper, queues) if keeper else None,
                    report=self._reporter(index, schedule, clock),
                    allow_nonfinite=self.allow_nonfinite,
                )
            )
        return result

    def _emit(
        self, lane: DecodeLane, keeper: Checkpointer | None, video: int, block: int, latents: torch.Tensor
    ) -> None:
        self._prompts[video].forget(block + 1)
        if keeper is not None:
            keeper.emit(video, block, latents)
        lane.emit(video, block, latents)

    @staticmethod
    def _cut(keeper: Checkpointer, queues: Sequence[LatentQueue], iteration: int) -> None:
        keeper.cut(iteration, lambda: [queue.state() for queue in queues])

    @staticmethod
    def _graphed(forward: Forward) -> Forward:
        return Graphed(forward, cuda_capture([]))

    def _reporter(self, index: int, schedule: Schedule, clock: BusyClock) -> Callable[[str, Unit], None] | None:
        if self.report is None:
            return None
        report, layers = self.report, len(self.layers[index])
        iteration = -1

        def tell(phase: str, unit: Unit) -> None:
            nonlocal iteration
            more = {}
            if phase == "run" and (now := unit.step + schedule.gap * unit.block) > iteration:
                iteration = now
                more = {"iteration": iteration, "busy": clock.seconds / layers}
            report(
                "wait_recv" if phase == "recv" else "wait_send" if phase == "send" else phase,
                stage=index,
                block=unit.block,
                step=unit.step,
                **more,
            )

        return tell

    def _edges(self, schedule: Schedule, request: Request) -> tuple[dict[int, Inbound], dict[int, Outbound]]:
        """Both ends of the edges of the stages here, by stage. Edge k leads from stage k to k + 1, the last to 0."""
        layout, grid, n = request.layout, request.grid, self.num_stages
        hidden = layout.max_window_frames * grid.tokens * self.source.spec.inner_dim
        velocity = layout.first_frames * self.source.spec.in_channels * grid.height * grid.width  # of the largest block
        sizes = [hidden + 1] * (n - 1) + [velocity + 1]  # and a mark, see `finite`
        names = [f"edge {k} -> {(k + 1) % n}" for k in range(n)]
        device = self.mesh.device
        if not self.mesh.distributed:
            local = [LocalEdge(names[k], sizes[k], self.depth, self.dtype, device) for k in range(n)]
            return {k: local[k - 1] for k in range(n)}, dict(enumerate(local))
        assert self._groups is not None
        rank = self.mesh.rank
        before, after = (rank - 1) % n, (rank + 1) % n
        common = self.depth, schedule.num_units, self.dtype, device
        inbound = ReceiveEdge(names[before], before, self._groups[before], sizes[before], *common)
        return {rank: inbound}, {rank: SendEdge(names[rank], after, self._groups[rank], sizes[rank], *common)}

    def _queue(self, index: int, schedule: Schedule, experts: list[int]) -> LatentQueue:
        request, prompts, count = self._requests[index], self._prompts[index], schedule.num_videos
        video, grid = request.video, request.grid
        scales = (
            video.guidance_scale,
            video.guidance_scale if video.guidance_scale_2 is None else video.guidance_scale_2,
        )
        noise = BlockNoise(
            request.layout,
            (self.source.spec.in_channels, grid.height, grid.width),
            video.seed,
            request.latents,
        )
        callback: StepCallback | None = None
        if request.callback is not None:
            user = request.callback

            def callback(block: int, step: int, timestep: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
                result = user(self, step, timestep, {"latents": latents, "block": block, "video": index}) or {}
                replaced: torch.Tensor = result.get("latents", latents)
                return replaced

        return LatentQueue(
            schedule,
            request.layout,
            request.sampler,
            noise,
            lambda block: prompts.of(block) * count + index,  # ids of all videos' prompts are different
            lambda prompt: prompts.embeds(prompt // count),
            [scales[e] for e in experts],
            self.mesh.device,
            callback,
        )

    def _finish(self, clocks: list[BusyClock], lane: DecodeLane | None, started: float, schedule: Schedule) -> None:
        """Collects what the run cost on every rank. Collective in a distributed run."""
        seconds = time.perf_counter() - started
        own = RankStats.of(clocks, self.mesh.device)
        ranks = [own]
        if self.mesh.distributed:
            rows = gather(
                self._store, self.mesh.rank, self.mesh.world_size, own.to_list(), HANDSHAKE_SECONDS,
                TIMEOUT.total_seconds(),
            )  # fmt: skip
            ranks = [RankStats.from_list(row) for row in rows or []]
        if lane is not None:
            done = lane.progress
            # The schedule's bubble is that of N stages at once and of the whole video.
            wanted = schedule.num_videos * ((schedule.num_blocks or 0) - schedule.first_block)
            whole = self.num_stages == len(ranks) and done.blocks - lane.before.blocks == wanted
            self.stats = RunStats(
                done.blocks - lane.before.blocks,
                done.frames - lane.before.frames,
                seconds,
                done.first or None,
                tuple(ranks),
                schedule_bubble(schedule) if whole else None,
            )


def _given_out(chunks: Iterator[Chunk], keeper: Checkpointer | None) -> Iterator[Chunk]:
    """Chunks; each counts as delivered when the next one is asked for."""
    for chunk in chunks:
        yield chunk
        if keeper is not None:
            keeper.delivered(chunk.video, chunk.block)


def _whole(chunks: list[Chunk], kind: OutputType) -> Any:
    """All videos of a run, with their axis in front; after an interruption so many frames as all of them have."""
    videos = [[c for c in chunks if c.video == video] for video in range(1 + max(c.video for c in chunks))]
    if kind == "pil":
        return [[image for chunk in own for image in chunk.frames] for own in videos]
    if kind == "latent":
        latents = [torch.cat([chunk.latents for chunk in own], dim=2) for own in videos]
        shortest = min(part.shape[2] for part in latents)
        return latents[0] if len(latents) == 1 else torch.cat([part[:, :, :shortest] for part in latents])
    join: Any = torch.cat if kind == "pt" else np.concatenate
    frames = [join([chunk.frames for chunk in own]) for own in videos]
    shortest = min(map(len, frames))
    return frames[0][None] if len(frames) == 1 else join([part[None, :shortest] for part in frames])


def _check_8bit(eight_bit: EightBitPolicy, source: ModelSource, device: torch.device, dtype: torch.dtype) -> None:
    """Raises ValueError when the model, the dtype or the device has no 8-bit attention like this."""
    eight_bit.check(source.spec.num_layers)
    if dtype == torch.float32:
        raise ValueError(
            f"attention_8bit={eight_bit.mode!r} with dtype=float32: values and weights beside 8-bit keys have 16 bits; "
            "use dtype='bfloat16'"
        )
    head_dim = source.spec.inner_dim // source.spec.heads
    reason = kernels_8bit.absent(device, head_dim, eight_bit.mode == "fp8") if device.type == "cuda" else ""
    if reason:
        raise ValueError(f"attention_8bit={eight_bit.mode!r} cannot run: {reason}; leave it out")
