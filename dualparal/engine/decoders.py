"""Decoders of a run: a thread beside stage 0, ranks of their own, or every stage's rank with a part of the rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch

from dualparal.decoding.delivery import Delivery
from dualparal.decoding.parts import LocalPart, Part, PartDecoder
from dualparal.decoding.ranks import RankPart, Service
from dualparal.distributed.decoders import DecoderGroups
from dualparal.distributed.parcels import ParcelLink
from dualparal.distributed.rows import RankRows, local_rows
from dualparal.engine.build import RunSpec
from dualparal.engine.parts import Parts
from dualparal.engine.setup import Setup
from dualparal.models.base import RowExchange
from dualparal.trace.clock import BusyClock
from dualparal.trace.timeline import Track


class DecoderBuilder:
    """Builds what decodes on this rank; arguments as ``Builder``'s."""

    def __init__(self, setup: Setup, parts: Parts, spec: RunSpec) -> None:
        self._setup, self._parts, self._spec = setup, parts, spec
        self._request, self._decoders = spec.requests[0], spec.schedule.decoders

    @property
    def places(self) -> list[int]:
        """The places that decode in this process: of one process all of them, of several its rank or none."""
        mesh = self._setup.mesh
        return [place for place in self._decoders if place == mesh.schedule_place or not mesh.distributed]

    @property
    def on_ranks(self) -> bool:
        """True when other ranks than the leading one decode, too."""
        return self._setup.mesh.distributed and self._decoders not in (range(0), range(1))

    def meet(self) -> None:
        """Opens the ways between ranks that decode, and to them. Collective; does nothing where there are none."""
        if self.on_ranks:
            _ = self._groups

    @property
    def _groups(self) -> DecoderGroups:
        return self._parts.decoder_groups(self._ranks)

    @property
    def _ranks(self) -> list[int]:
        """The ranks that decode, in the order of their rows."""
        return [self._setup.mesh.rank_of(place) for place in self._decoders]

    def delivery(self, clock: BusyClock, tracks: Mapping[int, Track | None]) -> Delivery:
        """The way out of finished blocks, on the rank that leads.

        Args:
            clock: of stage 0.
            tracks: rows of the timeline by place.
        """
        video, report = self._request.video, self._spec.report

        def waiting(block: int) -> None:
            if report is not None and self.on_ranks:
                report("wait_decoder", stage=0, block=block)

        return Delivery(
            self._request.layout,
            video,
            self._setup.source.spec.temporal_factor,
            len(self._spec.requests),
            self._parts_here_and_there(tracks) if self._decoders else None,
            lambda: clock.seconds,
            clock.track,
            waiting,
        )

    def service(self, track: Track | None, on_error: Callable[[BaseException], None]) -> Service:
        """The decoder of another rank than the leading one, which gives it latents.

        Args:
            track: its rows of the timeline.
            on_error: called with what it has raised.
        """
        mesh, report = self._setup.mesh, self._spec.report
        tell = None if report is None or mesh.stages else partial(report, **mesh.role)
        link = ParcelLink("latents of rank 0", 0, self._groups.links[mesh.rank])
        actions = self._spec.schedule.decodes(self.places[0])
        return Service(link, self._own_part(track), actions, tell, on_error)

    def _parts_here_and_there(self, tracks: Mapping[int, Track | None]) -> list[Part]:
        """All parts of the rows, the topmost first."""
        setup, decoders = self._setup, self._decoders
        found: list[Part] = []
        if self.on_ranks:
            as_tensor, links = self._request.video.output_type == "pt", self._groups.links
            for place in decoders:
                rank = setup.mesh.rank_of(place)
                if rank == setup.mesh.rank:
                    found.append(LocalPart(self._own_part(tracks[place]), alone=False))
                else:
                    link = ParcelLink(self._name(place), rank, links[rank])
                    found.append(RankPart(link, setup.mesh.device, as_tensor))
            return found
        device = setup.mesh.device
        stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # one, in the order of their swaps
        for place, way in zip(decoders, local_rows(len(decoders)), strict=True):
            part = self._part_decoder(place, way, stream, tracks.get(place))
            found.append(LocalPart(part, len(decoders) == 1, way.abort))
        return found

    def _own_part(self, track: Track | None) -> PartDecoder:
        """The decoders of this rank, among other ranks that decode."""
        place, rows = self.places[0], self._groups.rows
        way = None if rows is None else RankRows(rows, self._ranks, place - self._decoders.start)
        return self._part_decoder(place, way, None, track)

    def _part_decoder(
        self, place: int, way: RowExchange | None, stream: torch.cuda.Stream | None, track: Track | None
    ) -> PartDecoder:
        setup = self._setup
        return PartDecoder(
            self._parts.decoders(len(self._spec.requests), way),
            self._request.video.output_type,
            setup.mesh.device,
            self._name(place),
            setup.config.allow_nonfinite,
            stream,
            track,
        )

    def _name(self, place: int) -> str:
        if self._decoders == range(1):
            return "the decoder"
        name = f"decoder {place - self._decoders.start}"
        return f"{name} (rank {self._setup.mesh.rank_of(place)})" if self.on_ranks else name
