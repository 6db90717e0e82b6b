"""The parts of a model that this rank has loaded, and its open edges, kept from one run to the next."""

from __future__ import annotations

import gc
from collections.abc import Hashable, Sequence
from typing import Any

import torch

from dualparal.distributed.decoders import DecoderGroups, make_decoder_groups
from dualparal.distributed.mesh import drop_at_exit
from dualparal.distributed.remote import EdgeGroups, make_groups, warm_up
from dualparal.distributed.teams import TeamGroups, make_team_groups
from dualparal.engine.request import Request
from dualparal.engine.setup import Setup
from dualparal.engine.texts import Texts, texts_of
from dualparal.models.base import Decoder, RowExchange, Slice
from dualparal.sampling.prompts import Prompts


class Parts:
    """Loads each part of the model at its first use, and opens the edges between ranks once.

    Attributes:
        texts: embeddings of prompts.
        slices: by stage, its layers, one slice per transformer of the model.
        warmed: names of what earlier runs have done before their first unit, see ``runtime.warm_up``.
    """

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self.texts = Texts(setup)
        self.slices: dict[int, list[Slice]] = {}  # by stage: one per expert
        self.warmed: set[Hashable] = set()
        self._vae: Any = None
        self._light: Any = None  # what light decoders share
        self._groups: list[EdgeGroups] | None = None
        self._team_groups: list[TeamGroups] | None = None
        self._decoder_groups: list[DecoderGroups] = []  # one, once they are made

    def load(self) -> None:
        """Reads the layers of this rank's stages, unless they are here. Raises ModelError, OSError."""
        setup = self._setup
        for stage in setup.mesh.stages:
            if stage not in self.slices:
                layers, policy = setup.layers[stage], setup.config.linear_8bit
                self.slices[stage] = setup.source.load_slices(layers, setup.dtype, setup.mesh.device, policy)

    @property
    def has_decoder(self) -> bool:
        """True once what decodes is in memory."""
        return (self._vae if self._setup.light is None else self._light) is not None

    @property
    def vae(self) -> Any:
        """The VAE (diffusers), loaded at first use. Raises ModelError, OSError."""
        if self._vae is None:
            self._vae = self._setup.source.load_vae(self._setup.mesh.device, self._setup.vae_dtype)
        return self._vae

    def drop_vae(self) -> None:
        """Gives the VAE's memory back, where nobody decodes with it."""
        if self._vae is not None:
            self._vae = None
            gc.collect()
            if self._setup.mesh.device.type == "cuda":
                torch.cuda.empty_cache()

    def decoders(self, count: int, rows: RowExchange | None = None) -> list[Decoder]:
        """The decoders of ``count`` videos, one for each; they share the VAE, or the tensors of a light decoder.

        Args:
            count: number of videos.
            rows: the way to the other parts of the picture's rows; None: they decode all of them.
        """
        setup, light = self._setup, self._setup.light
        if light is None:
            return [setup.source.family.decoder(self.vae, rows) for _ in range(count)]
        if self._light is None:
            self._light = light.load(setup.mesh.device, setup.vae_dtype)
        return [light.decoder(self._light, rows) for _ in range(count)]

    def encode(self, requests: Sequence[Request]) -> list[Prompts]:
        """The prompts of each video, encoded. The text encoder is loaded if it is needed, and dropped."""
        made = iter(self.texts.encode(texts_of(requests)))
        found = []
        for request in requests:
            embeds = {} if request.embeds is None else {0: request.embeds}
            found.append(Prompts(embeds | {block: next(made) for block in request.prompts}))
        return found

    @property
    def edge_groups(self) -> list[EdgeGroups]:
        """The communicators of every directed edge, opened and warmed up. The first use is collective."""
        if self._groups is None:
            mesh = self._setup.mesh
            self._groups = make_groups(mesh.num_stages, mesh.device, mesh.places)
            drop_at_exit(self._groups)
            warm_up(self._groups, mesh.rank, mesh.device, mesh.places)
        return self._groups

    @property
    def team_groups(self) -> list[TeamGroups]:
        """The communicators of every stage's ranks; empty where a stage has one. The first use is collective."""
        if self._team_groups is None:
            mesh = self._setup.mesh
            self._team_groups = make_team_groups(mesh.num_stages, mesh.places, mesh.device)
            drop_at_exit(self._team_groups)
        return self._team_groups

    def decoder_groups(self, ranks: Sequence[int]) -> DecoderGroups:
        """The communicators of the ranks that decode, the same in all runs. The first call is collective."""
        if not self._decoder_groups:
            self._decoder_groups.append(make_decoder_groups(ranks, self._setup.mesh.device))
            drop_at_exit(self._decoder_groups)
        return self._decoder_groups[0]
