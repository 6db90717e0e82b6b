"""The public engine: a model, cut into stages, that makes long videos of blocks in flight."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dualparal.checkpoint import snapshot
from dualparal.checkpoint.checkpointer import Checkpoint
from dualparal.checkpoint.snapshot import Resumed
from dualparal.config.engine import EngineConfig
from dualparal.config.video import OutputType, VideoConfig
from dualparal.decoding.chunks import Chunk
from dualparal.distributed.mesh import Mesh
from dualparal.engine.build import RunSpec
from dualparal.engine.capacity import ResultKind, check_requests
from dualparal.engine.claimed import Claimed
from dualparal.engine.identity import check_same_run
from dualparal.engine.inputs import Prompt, callback_of, check_unused, split_videos
from dualparal.engine.parts import Parts
from dualparal.engine.request import Request, check_alike, check_request, schedule_of
from dualparal.engine.result import EngineOutput, whole_videos
from dualparal.engine.resume import check_restartable, decode_again, requests_of
from dualparal.engine.run import Run
from dualparal.engine.setup import Setup
from dualparal.kernels.backend import current
from dualparal.models.defaults import model_defaults
from dualparal.models.source import ModelSource
from dualparal.trace.stats import RunStats
from dualparal.trace.timeline import check_name

logger = logging.getLogger("dualparal")

EngineCallback = Callable[["Engine", int, torch.Tensor, dict[str, Any]], dict[str, Any] | None]
BUSY = (
    "this engine is making a video: exhaust or close that stream first, give all prompts in one call, or use another "
    "engine"
)


class Engine:
    """Makes long videos from a stock Wan text-to-video model. Build one with ``from_pretrained``.

    In one process it runs its stages in turn; in a distributed run (torchrun, ``dualparal generate``) every rank
    builds the same engine, makes the same calls and owns one stage, and the leading rank, 0, gets the video.

    Attributes:
        setup: its model, options and place.
        report: called before every action, see ``from_pretrained``; None: nobody listens.
        scheduler: diffusers' sampler object; assign another one as in diffusers.
        stats: cost of the last run, on the leading rank; None before the end of the first.
        parts: the parts of the model that are loaded.
    """

    def __init__(self, setup: Setup, report: Callable[..., None] | None = None) -> None:
        self.setup = setup
        self.report = report
        self.scheduler: Any = setup.source.load_scheduler()
        self.stats: RunStats | None = None
        self.parts = Parts(setup)
        self._run: Run | None = None  # the last one that was asked for, or that is under way
        self._claim = threading.Lock()  # held from a stream's being asked for to its end

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | Any,
        config: EngineConfig | None = None,
        *,
        report: Callable[..., None] | None = None,
        **options: Any,
    ) -> Engine:
        """An engine for a model. Weights are read at the first request, and then only this rank's.

        Args:
            model: a directory in diffusers format, a hub id, or a loaded WanPipeline.
            config: options as one value; or give its fields as ``options``.
            report: called with (phase, block=, step=, stage=, action=) before every action, of which each stage counts
                its own; for supervisors. At the first unit of an iteration besides with iteration= and busy=, seconds
                per layer spent in units so far, stage 0 with decoding= too, the same of the decoder beside it; and
                stage 0 at every unit with units=, those that it has run, and total_units= (None: endless).
            options: fields of ``EngineConfig`` and of ``BlockConfig``: frames_per_block, context_frames, context,
                stages, device, dtype, attention_8bit ... . A torch.dtype or torch.device will do.

        Raises:
            ValueError: bad values, or a model that is not supported (``ModelError``), before weights are read.
        """
        if config is not None and options:
            raise ValueError(f"config and {', '.join(options)} were both given; say it in one place")
        return cls(Setup.of(model, config or EngineConfig.of(model_defaults(model).blocks, **options)), report)

    @property
    def source(self) -> ModelSource:
        """The model."""
        return self.setup.source

    @property
    def config(self) -> EngineConfig:
        """The options it is run with, with nothing left open."""
        return self.setup.config

    @property
    def mesh(self) -> Mesh:
        """This process among those of the run."""
        return self.setup.mesh

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the transformer."""
        return self.setup.dtype

    def vae(self) -> Any:
        """The VAE (diffusers), loaded at first use. Raises ModelError, OSError."""
        return self.parts.vae

    def __call__(self, prompt: Prompt | Sequence[Prompt] | None = None, **kwargs: Any) -> EngineOutput:
        """Makes whole videos at once.

        Args:
            prompt: as in ``stream``.
            kwargs: the other arguments of ``stream``, and ``return_dict`` (False: a tuple of the frames alone).

        Returns:
            ``frames`` by ``output_type``, as in diffusers: "np" [V, F, H, W, 3], "pt" [V, F, 3, H, W], "pil" a list
            of V lists, "latent" [V, C, L, h, w]; V is 1 unless there are several prompts. None on ranks that do not
            lead.

        Raises:
            ValueError: as ``stream`` raises it, or an endless video.
        """
        return whole_videos(self, prompt, kwargs)

    def stream(
        self,
        prompt: Prompt | Sequence[Prompt] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = 81,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_scale_2: float | None = None,
        num_videos_per_prompt: int | None = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        output_type: OutputType | None = "np",
        attention_kwargs: Mapping[str, Any] | None = None,
        callback_on_step_end: EngineCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int = 512,
        *,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        seed: int | Sequence[int] | None = None,
        image: Any = None,
        last_image: Any = None,
        video: str | Path | torch.Tensor | Sequence[Any] | None = None,
        timeline: str | Path | None = None,
        checkpoint: str | Path | Checkpoint | None = None,
        result_kind: ResultKind | None = None,
    ) -> Iterator[Chunk]:
        """Yields every block as soon as it is finished. The request is checked before this returns.

        Arguments and meanings are ``WanPipeline.__call__``'s, and besides:

        Args:
            prompt: a text, or {first frame: text}: blocks from that frame on take it. A list of these (or rows of
                ``prompt_embeds``): as many independent videos, whose units take turns; ``chunk.video`` says whose it
                is, and each has the bits that it has alone. ``negative_prompt``, ``seed``, ``generator`` may then be
                lists, and ``latents`` and embeddings have a row for each.
            height, width, guidance_scale: None: those that the model brings (``models.defaults``), else diffusers'.
            num_frames: None for an endless video; stop by closing the iterator or calling ``interrupt``.
            num_inference_steps: None: the length of a list of steps, or what the model brings, else 50.
            timesteps, sigmas: the steps one by one, as diffusers' ``retrieve_timesteps`` takes them; at most one of
                them, and of a sampler that has it.
            seed: of the noise (default 0), in video v of several seed + v; or give a ``generator``, from which one is
                drawn for each.
            latents: initial noise [V, C, L, h, w] instead of the seed's.
            num_videos_per_prompt, attention_kwargs: videos of each prompt, in a row; refused unless it is empty.
            callback_on_step_end: called on rank 0 as (engine, step, timestep, {"latents", "block", "video"}) after
                every step of every block; a returned dict's "latents" replace them. Of tensors there are latents alone.
            image, last_image: the video's first and last frame, for models that take them: a path, a PIL image, or an
                array [height, width, 3] of uint8 or of numbers from 0 to 1, stretched to the video's size as diffusers
                does it; a list of them: one for each video. The same on all ranks.
            video: a clip that the video goes on from: the path of an mp4 file of the video's size, or latents
                [1, C, L, h, w] of its end, such as ``chunk.latents``; a list of them: one for each video. Those of
                ``num_frames`` come after it, a multiple of four, and are all that is given out. The same on all ranks.
            timeline: a .json or .json.gz file for a trace of the run (ui.perfetto.dev opens it), replaced if it is
                there; the same on all ranks. It is whole when the stream has ended; what ranks on other nodes, or a
                distributed run that failed, left is in ``FILE.parts``, for ``dualparal.trace.timeline.merge``.
            checkpoint: a folder for snapshots (or a ``Checkpoint``), from which ``resume`` goes on after whatever
                happens; the same on all ranks, written by rank 0. A snapshot counts a block as finished when the
                next chunk has been asked for. With ``cached`` and ``prior`` the engine needs ``refresh_every``.
            result_kind: "frames" or "latents", the part of all chunks that the caller will have in memory at the end,
                on the CPU. It counts when the request is checked against the memory there is. None: no part.

        Raises:
            ValueError: a request that cannot be run; names the value, the rule and the way out.
            RuntimeError: this engine is making a video, perhaps in another thread: it is taken from here on until the
                iterator has ended, was closed or dropped.

        While the iterator runs it raises what ``engine.run.Run.chunks`` raises.
        """
        check_unused(attention_kwargs)
        callback = callback_of(callback_on_step_end, callback_on_step_end_tensor_inputs, self)
        config = VideoConfig.of(
            self.source.defaults,
            height=height,
            width=width,
            num_frames=num_frames,
            num_inference_steps=num_inference_steps,
            timesteps=timesteps,
            sigmas=sigmas,
            guidance_scale=guidance_scale,
            guidance_scale_2=guidance_scale_2,
            output_type=output_type or "np",
            max_sequence_length=max_sequence_length,
            continues=video is not None,
        )
        inputs = split_videos(
            prompt,
            negative_prompt,
            seed,
            generator,
            latents,
            prompt_embeds,
            negative_prompt_embeds,
            image,
            last_image,
            video,
            num_videos_per_prompt,
        )
        requests = [check_request(self.setup, self.scheduler, config, each, callback) for each in inputs]
        check_alike(requests)
        check_requests(self.setup, self.parts, requests, result_kind)
        if checkpoint is not None:
            checkpoint = checkpoint if isinstance(checkpoint, Checkpoint) else Checkpoint(Path(checkpoint))
            check_restartable(self.setup, requests)
            if self.mesh.is_leader:
                snapshot.prepare(checkpoint.folder)
        return self._begin(requests, timeline, checkpoint)

    def resume(
        self,
        checkpoint: str | Path | Checkpoint,
        *,
        callback_on_step_end: EngineCallback | None = None,
        timeline: str | Path | None = None,
    ) -> Iterator[Chunk]:
        """Goes on with a run from its last snapshot, on any number of stages, and keeps on writing snapshots there.

        The request is the snapshot's, prompts included; the text encoder is not loaded. The engine must have the
        model, blocks, dtype, 8-bit attention and sampler of that run; with another ``vae_dtype`` it goes on, and warns.
        A run whose blocks are all finished has no chunks left.
        Chunks come from the first block that the snapshot does not count as finished, with the bits of an unbroken run
        on cards of the same type with the same torch; a block that had been given out already comes again.

        Args:
            checkpoint: the folder with snapshots. Of a ``Checkpoint``, ``notes`` are replaced by the snapshot's.
            callback_on_step_end, timeline: as in ``stream``.

        Raises:
            SnapshotError: no snapshot that can be used, or one of another model or another engine.
            ValueError, RuntimeError: as ``stream`` raises them.
        """
        checkpoint = checkpoint if isinstance(checkpoint, Checkpoint) else Checkpoint(Path(checkpoint))
        resumed = snapshot.newest(checkpoint.folder)
        checkpoint = replace(checkpoint, notes=resumed.snapshot.run.get("notes", {}))
        callback = callback_on_step_end and partial(callback_on_step_end, self)
        requests = requests_of(self.setup, self.scheduler, resumed.snapshot, checkpoint.folder, callback)
        if not requests:
            nothing: Sequence[Chunk] = ()
            return (chunk for chunk in nothing)
        check_restartable(self.setup, requests)
        check_requests(self.setup, self.parts, requests, None)
        return self._begin(requests, timeline, checkpoint, resumed)

    def _begin(
        self,
        requests: Sequence[Request],
        timeline: str | Path | None,
        checkpoint: Checkpoint | None,
        resumed: Resumed | None = None,
    ) -> Iterator[Chunk]:
        self.config.attention_8bit.check_steps(len(requests[0].steps.runs))
        if self.mesh.is_leader and (warning := requests[0].sampler.warning) is not None:
            logger.warning(warning)
        if timeline is not None:
            timeline = Path(timeline)
            check_name(timeline)
        schedule = schedule_of(self.setup, requests, 0 if resumed is None else resumed.snapshot.iteration)
        spec = RunSpec(requests, schedule, self.scheduler, timeline, checkpoint, resumed, self.report)
        if not self._claim.acquire(blocking=False):
            raise RuntimeError(BUSY)
        self._run = Run(self.setup, self.parts, spec)
        return Claimed(self._follow(self._run), self._claim)

    def _follow(self, run: Run) -> Generator[Chunk, None, None]:
        try:
            yield from run.chunks()
        finally:
            self.stats = run.stats or self.stats

    def decode_again(self, checkpoint: str | Path, blocks: Sequence[int], video: int = 0) -> Iterator[tuple[int, Any]]:
        """Decodes finished blocks of a checkpointed run once more, from the latents that its folder keeps.

        Args:
            checkpoint: the folder of a run with ``Checkpoint(keep_latents=True)``, made with an engine like this one.
            blocks: in their order.
            video: index of the video.

        Yields:
            A block and its frames, as the run's ``output_type`` has them, with the bits that they had.

        Raises:
            SnapshotError: no such run, or latents that are missing or damaged.
            RuntimeError: this engine is making a video.
        """
        folder = Path(checkpoint)
        found = snapshot.newest(folder).snapshot
        check_same_run(self.setup, self.scheduler, found)
        if not self._claim.acquire(blocking=False):
            raise RuntimeError(BUSY)
        try:
            with current(self.mesh.device):
                yield from decode_again(self.setup, self.parts, found, folder, video, blocks)
        finally:
            self._claim.release()

    def set_prompt(self, prompt: str, negative_prompt: str | None = None, *, video: int = 0) -> int:
        """Changes a video's prompt while it runs: blocks in flight keep theirs, new ones take this. Leading rank only.

        A new text is encoded on the CPU, beside the stages, whatever their device.

        Args:
            prompt: a text.
            negative_prompt: a text; None: that of the request.
            video: index of the video.

        Returns:
            The first block that takes the new prompt.

        Raises:
            RuntimeError: no video is running.
            ValueError: no such video; ``TooLarge`` when the host has no room for the text encoder beside the run.
        """
        if self._run is None:
            raise RuntimeError("set_prompt: no video is running; give the prompt to stream()")
        return self._run.change_prompt(video, prompt, negative_prompt)

    @property
    def interrupted(self) -> bool:
        """True when ``interrupt`` was called for the last run, which may have ended early by it."""
        return self._run is not None and self._run.interrupted

    def interrupt(self) -> None:
        """Ends the running videos after the unit under way; finished blocks are still given out. Signal-safe."""
        if self._run is not None:
            self._run.interrupt()
