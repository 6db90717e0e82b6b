"""One run of an engine on this rank, from the meeting of the ranks to what it cost."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from itertools import count
from typing import Any

import torch
import torch.distributed as dist

from dualparal.checkpoint.checkpointer import Checkpointer
from dualparal.decoding.chunks import Chunk, NonFiniteError
from dualparal.decoding.delivery import Delivery
from dualparal.decoding.ranks import Service
from dualparal.distributed.figures import collect
from dualparal.distributed.handshake import handshake
from dualparal.distributed.messages import PeerLost
from dualparal.distributed.remote import ReceiveEdge
from dualparal.engine.build import Builder, RunSpec
from dualparal.engine.capacity import check_text_encoder
from dualparal.engine.clips import encode_clips
from dualparal.engine.decoders import DecoderBuilder
from dualparal.engine.identity import run_info
from dualparal.engine.images import encode_images
from dualparal.engine.inversion import invert_clips
from dualparal.engine.parts import Parts
from dualparal.engine.resume import restore
from dualparal.engine.setup import Setup
from dualparal.engine.texts import Text
from dualparal.kernels.backend import current
from dualparal.runtime.executor import StageExecutor, run_together
from dualparal.sampling.continued import Clip
from dualparal.sampling.images import ImageCondition
from dualparal.sampling.prompts import Prompts
from dualparal.schedule.schedule import Schedule
from dualparal.trace.clock import BusyClock
from dualparal.trace.stats import RankStats, RunStats, Waits, schedule_bubble
from dualparal.trace.timeline import Recorder, Track, merge_left, prepare

HANDSHAKE_SECONDS = 60.0
_runs = count()  # a store of its own for each


class Run:
    """Makes the videos of a spec, once. ``chunks`` does the work, while it is iterated.

    Attributes:
        spec: the videos, their order of work, and what is kept of them.
        running: units are under way.
        interrupted: ``interrupt`` was called.
        stats: cost of the run, on the rank that leads, when it has ended.
    """

    def __init__(self, setup: Setup, parts: Parts, spec: RunSpec) -> None:
        self.spec = spec
        self.running = self.interrupted = False
        self.stats: RunStats | None = None
        self._setup, self._mesh, self._parts = setup, setup.mesh, parts
        self._prompts: list[Prompts] = []  # of every video, on the rank that leads, while it runs
        self._images: list[ImageCondition | None] = []  # the same of what the model is told of images
        self._clips: list[Clip | None] = []  # that videos go on from
        self._pools: list[torch.Tensor] = []  # their noise
        self._store: Any = None  # where the ranks meet
        self._executors: list[StageExecutor] = []
        self._decoders = DecoderBuilder(setup, parts, spec)
        self._decoder: Delivery | None = None
        self._service: Service | None = None  # to the leading rank, on another one that decodes
        self._keeper: Checkpointer | None = None
        self._started = 0.0

    def interrupt(self) -> None:
        """Ends the run after the unit under way; finished blocks are still given out. Signal-safe."""
        self.interrupted = True

    def change_prompt(self, video: int, prompt: str, negative_prompt: str | None) -> int:
        """Gives new blocks of a video another prompt. Returns the first of them.

        Raises:
            RuntimeError: nothing runs here.
            ValueError: no such video; ``TooLarge`` when the host has no room for the text encoder beside the run.
        """
        if not self._prompts:
            raise RuntimeError("set_prompt: no video is running; give the prompt to stream()")
        if not 0 <= video < len(self._prompts):
            raise ValueError(f"video={video}: {len(self._prompts)} are running, counted from 0")
        request = self.spec.requests[video]
        texts = [Text.of(request, prompt, negative_prompt or request.negative_prompt)]
        if self._parts.texts.new(texts, beside=True):
            check_text_encoder(self._setup)
        first = self._prompts[video].change(*self._parts.texts.encode(texts, beside=True))
        return first - request.video.skipped_blocks

    def chunks(self) -> Iterator[Chunk]:
        """Yields finished blocks, as soon as they are finished; none on ranks that do not lead.

        While it works the run's card is the current one: events, streams and captures are made on that. Between two
        chunks it is the consumer's own.

        Raises:
            ValueError: ranks disagree on the run; ``ModelError`` for weights that cannot be used.
            NonFiniteError: NaN or infinity in latents; blocks finished before are given out first.
            PeerLost, TransportError, TimeoutError: another rank is gone, sends something else, or did not come.
            OSError: a file cannot be read or written.
        """
        chunks = self._chunks()
        try:
            while True:
                with current(self._mesh.device):
                    chunk = next(chunks, None)
                if chunk is None:
                    return
                yield chunk
        finally:
            with current(self._mesh.device):
                chunks.close()

    def _chunks(self) -> Generator[Chunk, None, None]:
        recorder: Recorder | None = None
        clocks: list[BusyClock] = []
        finished = False
        try:
            self._meet()
            self._encode()
            self._parts.load()
            self._invert()
            recorder, clocks = self._clocks()
            self._build(clocks, recorder)
            self._started = time.perf_counter()
            self.running = True
            yield from self._walk()
            self.running = False
            if self._decoder is not None:
                yield from self._given_out(self._decoder.drain())
            if self._keeper is not None:
                self._keeper.close()
            self._end_decoding()
            self._finish(clocks)
            finished = True
        except NonFiniteError:
            if self._decoder is not None:  # else it is a clip that cannot be inverted
                yield from self._decoder.drain()  # blocks finished before are whole
            raise
        except PeerLost:
            if self._service is not None and self._service.error is not None:
                raise self._service.error from None  # for which others have left
            raise
        except GeneratorExit:  # the consumer has had enough
            if self.running:
                self._stop()
            self._end_decoding()
            self._finish(clocks)
            finished = True
            raise
        finally:
            self._close(recorder, clocks, finished)

    def _walk(self) -> Iterator[Chunk]:
        """Performs what this rank has to do; on the rank that leads, yields the chunks finished meanwhile."""
        for _ in run_together(self._executors):
            if self._decoder is not None:
                yield from self._given_out(self._decoder.ready())
                if self.interrupted:
                    self._stop()
                    break

    def _given_out(self, chunks: Iterator[Chunk]) -> Iterator[Chunk]:
        """Yields the chunks; each counts as delivered when the next one is asked for."""
        for chunk in chunks:
            yield chunk
            if self._keeper is not None:
                self._keeper.delivered(chunk.video, chunk.block)

    # Before ---------------------------------------------------------------------------------------------------

    def _meet(self) -> None:
        """Compares this run with that of the other ranks, before tensors travel. Raises ValueError, TimeoutError."""
        mesh, spec = self._mesh, self.spec
        if not mesh.distributed:
            return
        info = run_info(self._setup, spec.scheduler, spec.requests, spec.schedule, spec.timeline, spec.resumed)
        self._store = dist.PrefixStore(f"dualparal/{next(_runs)}", dist.distributed_c10d._get_default_store())
        handshake(self._store, mesh.rank, mesh.world_size, info, HANDSHAKE_SECONDS)
        _ = self._parts.edge_groups, self._parts.team_groups  # opened while all ranks are here
        self._decoders.meet()

    def _encode(self) -> None:
        """Makes prompts and images of all videos on the rank that leads: encoded, or from the snapshot."""
        if not self._mesh.is_leader:
            return
        resumed, requests = self.spec.resumed, self.spec.requests
        if resumed is None:
            self._prompts = self._parts.encode(requests)
            self._images = encode_images(self._setup, self._parts, requests)
            self._clips = encode_clips(self._setup, self._parts, requests)
            if (any(self._images) or any(self._clips)) and (self._setup.light is not None or not self._decoders.places):
                self._parts.drop_vae()  # which is for this alone
        else:
            self._images = [request.condition for request in requests]
            self._clips = encode_clips(self._setup, self._parts, requests)
            self._prompts = [Prompts(dict(prompts)) for prompts in resumed.snapshot.prompts]

    def _invert(self) -> None:
        """Makes the noise of clips, with all stages, or takes it from the snapshot."""
        spec = self.spec
        if spec.resumed is not None:
            self._pools = [request.pool for request in spec.requests if request.pool is not None]
        elif spec.requests[0].video.continues:
            self._pools = invert_clips(self._setup, self._parts, spec, self._prompts, self._clips)

    def _clocks(self) -> tuple[Recorder | None, list[BusyClock]]:
        """A clock per stage here, and this rank's part of the timeline that they write, if one is wanted."""
        mesh, timeline = self._mesh, self.spec.timeline
        if timeline is None:
            return None, [BusyClock(mesh.device) for _ in mesh.stages]
        if mesh.is_leader:
            prepare(timeline)
        # The other ranks come out of here later than the leading one went in: the folder for their parts is ready.
        offset = mesh.clock_offset() if mesh.distributed else 0.0
        recorder = Recorder(timeline, mesh.rank, mesh.world_size, offset)
        if mesh.place:  # the first place of the stage does the same at the same time
            return recorder, [BusyClock(mesh.device) for _ in mesh.stages]
        return recorder, [BusyClock(mesh.device, recorder.track(stage, mesh.num_stages)) for stage in mesh.stages]

    def _build(self, clocks: Sequence[BusyClock], recorder: Recorder | None) -> None:
        """Makes executors and decoders and, on the rank that leads, the keeper; restores a resumed run."""
        builder = Builder(self._setup, self._parts, self.spec, self._prompts, self._images, self._clips, self._pools)
        spec, mesh = self.spec, self._mesh
        tracks: dict[int, Track | None] = {stage: clock.track for stage, clock in zip(mesh.stages, clocks, strict=True)}
        if recorder is not None:
            tracks |= {p: recorder.track(p, mesh.num_stages) for p in self._decoders.places if p not in tracks}
        if mesh.is_leader:
            self._decoder = self._decoders.delivery(clocks[0], tracks)
            self._keeper = builder.checkpointer(self._decoder)
        elif self._decoders.places:
            (place,) = self._decoders.places
            self._service = self._decoders.service(tracks.get(place), self._fail)
        self._executors = builder.executors(clocks, self._decoder, self._keeper, self._decoding())
        if self._service is not None:
            self._service.start()
        builder.warm_up(self._executors, self._decoder)
        leading = self._executors[0].leading if self._executors else None
        if spec.resumed is not None and spec.checkpoint is not None and leading is not None:
            assert self._decoder is not None
            folder, found = spec.checkpoint.folder, spec.resumed.snapshot
            restore(leading.queues, self._decoder, folder, found, spec.schedule, self._clips)
        elif self._decoder is not None and any(self._clips):
            self._decoder.resume(0, [[clip.before] if clip else [] for clip in self._clips])

    # After ----------------------------------------------------------------------------------------------------

    def _stop(self) -> None:
        """Ends the run on all ranks."""
        if self._mesh.distributed and self._mesh.is_leader and self._mesh.stage_ranks > 1:
            self._executors[0].stop()

    def _end_decoding(self) -> None:
        """Ends the decoders here, and those of other ranks. Raises what decoding has raised."""
        if self._decoder is not None:
            self._decoder.close()
        if self._service is not None:
            self._service.finish()

    def _fail(self, error: BaseException) -> None:
        """Makes the stages of this rank end with an error of its decoder."""
        for executor in self._executors:
            if isinstance(executor.inbound, ReceiveEdge):
                executor.inbound.fail(error)

    def _decoding(self) -> Callable[[], float] | None:
        """() -> seconds that decoding has taken from this rank's device so far. None: it does not decode."""
        if self._service is not None:
            return self._service.part.decoding
        return None if self._decoder is None else self._decoder.decoding

    def _finish(self, clocks: Sequence[BusyClock]) -> None:
        """Collects what the run cost on every rank. Collective in a distributed run."""
        mesh, seconds = self._mesh, time.perf_counter() - self._started
        waited = sum(executor.waited() for executor in self._executors)
        beside = () if self._decoder is None else (self._decoder.waited, self._decoder.consumed)
        own = RankStats.of(clocks, mesh.device, Waits(waited, *beside))
        if not mesh.stages and self._service is not None:  # its work is decoding
            own = replace(own, busy=self._service.part.decoding(), elapsed=seconds)
        ranks = [own]
        if mesh.distributed:
            if self.spec.report is not None and not mesh.is_leader:
                self.spec.report("wait_end", **mesh.role)  # for a consumer who may take his time
            ranks = [RankStats.from_list(row) for row in collect(mesh, self._store, own.to_list())]
        if self._decoder is not None:
            done, before = self._decoder.progress, self._decoder.before
            blocks = done.blocks - before.blocks
            stages = mesh.stage_ranks if mesh.distributed else mesh.num_stages
            whole = stages == len(ranks[:stages]) and blocks == _blocks(self.spec.schedule)
            self.stats = RunStats(
                blocks,
                done.frames - before.frames,
                seconds,
                done.first or None,
                tuple(ranks[:stages]),
                # That of N stages at once and of the whole video.
                schedule_bubble(self.spec.schedule) if whole else None,
                tuple(ranks[stages:]),
            )

    def _close(self, recorder: Recorder | None, clocks: Sequence[BusyClock], finished: bool) -> None:
        """Closes everything that was opened, and lets go of it. Errors that follow from others are dropped."""
        if self._decoder is not None:
            with contextlib.suppress(Exception):  # as below
                self._decoder.close(failed=not finished)
        if self._keeper is not None:
            with contextlib.suppress(Exception):  # after a run to its end it is closed; else what ended it says more
                self._keeper.close()
        if recorder is not None:
            for clock in clocks:
                with contextlib.suppress(RuntimeError):  # a device in error has no more to tell
                    clock.settle()
            recorder.close()
            # After a failure other ranks may still be writing their parts.
            if self._mesh.is_leader and (finished or not self._mesh.distributed):
                merge_left(recorder.path)
        for executor in self._executors:
            executor.close()
        self._prompts, self._images, self._clips, self._pools, self._executors = [], [], [], [], []
        self._decoder = self._keeper = self._service = None
        self.running = False


def _blocks(schedule: Schedule) -> int:
    """Blocks of all videos that a schedule finishes."""
    return schedule.num_videos * ((schedule.num_blocks or 0) - schedule.first_block)
