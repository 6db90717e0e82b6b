"""What this rank has loaded and opened, kept from one run of an engine to the next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dualparal.distributed.edges import make_groups, warm_up
from dualparal.distributed.mesh import drop_at_exit
from dualparal.engine.request import Request
from dualparal.engine.setup import Setup
from dualparal.models.base import Decoder, Slice
from dualparal.sampling.prompts import Prompts


class Parts:
    """Loads each part of the model at its first use, and opens the edges between ranks once."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        source, device, dtype = setup.source, setup.mesh.device, setup.dtype
        self.encoder = source.family.prompt_encoder(lambda: source.load_text_encoder(device, dtype), device)
        self.slices: dict[int, list[Slice]] = {}  # by stage: one per expert
        self._vae: Any = None
        self._groups: list[Any] | None = None

    def load(self) -> None:
        """Reads the layers of this rank's stages, unless they are here. Raises ModelError, OSError."""
        setup = self._setup
        for stage in setup.mesh.stages:
            if stage not in self.slices:
                self.slices[stage] = setup.source.load_slices(setup.layers[stage], setup.dtype, setup.mesh.device)

    @property
    def vae(self) -> Any:
        if self._vae is None:
            self._vae = self._setup.source.load_vae(self._setup.mesh.device)
        return self._vae

    def decoders(self, count: int) -> list[Decoder]:
        """One for each video; they share the VAE."""
        return [self._setup.source.family.decoder(self.vae) for _ in range(count)]

    def encode(self, requests: Sequence[Request]) -> list[Prompts]:
        """The prompts of each video as embeddings. The text encoder is loaded if one is needed, and dropped."""
        found = []
        for request in requests:
            embeds = {} if request.embeds is None else {0: request.embeds}
            for block, text in request.prompts.items():
                embeds[block] = self.encode_text(request, text, request.negative_prompt)
            found.append(Prompts(embeds))
        self.encoder.free()
        return found

    def encode_text(self, request: Request, prompt: str, negative_prompt: str | None) -> torch.Tensor:
        """Embeddings [1 or 2, tokens, text_dim] of a prompt for a video. The encoder stays loaded."""
        video = request.video
        return self.encoder.encode(prompt, negative_prompt, video.guidance, video.max_sequence_length)

    @property
    def edge_groups(self) -> list[Any]:
        """A communicator per directed edge, opened and warmed up. The first use is collective."""
        if self._groups is None:
            mesh = self._setup.mesh
            self._groups = make_groups(mesh.world_size)
            drop_at_exit(self._groups)
            warm_up(self._groups, mesh.rank, mesh.device)
        return self._groups
