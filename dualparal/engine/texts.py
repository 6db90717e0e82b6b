"""Texts to embeddings: the encoder is loaded for those that are new and dropped again, what it made is kept."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import torch

from dualparal.engine.request import Request
from dualparal.engine.setup import Setup
from dualparal.models.files import ModelFiles
from dualparal.models.tokenizing import try_tokenizer

_MOST_BYTES = 256 * 2**20  # kept: of 512 tokens in 16 bits with guidance some 30
_CPU = torch.device("cpu")


class Text(NamedTuple):
    """All that embeddings depend on; fields as the arguments of ``models.base.PromptEncoder.encode``."""

    prompt: str
    negative_prompt: str | None
    guidance: bool
    max_sequence_length: int

    @classmethod
    def of(cls, request: Request, prompt: str, negative_prompt: str | None) -> Text:
        """A prompt for the video of a request."""
        return cls(prompt, negative_prompt, request.video.guidance, request.video.max_sequence_length)


class Texts:
    """The embeddings of an engine's prompts. Methods may be called from any thread.

    Those of a loaded pipeline are not kept: its encoder is the user's, who may change it between two calls.
    """

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._kept: OrderedDict[tuple[str, Text], torch.Tensor] = OrderedDict()  # used last, last
        self._lock = threading.Lock()

    def device(self, beside: bool = False) -> torch.device:
        """The device of the encoder.

        Args:
            beside: a stage is at work. On a card the request was checked without an encoder: it goes to the CPU.
        """
        return _CPU if beside or self._setup.config.encodes_elsewhere else self._setup.mesh.device

    def new(self, texts: Sequence[Text], beside: bool = False) -> bool:
        """True when the encoder would have to be loaded for one of them."""
        where = self.device(beside).type
        return any((where, text) not in self._kept for text in texts)

    def encode(self, texts: Sequence[Text], beside: bool = False) -> list[torch.Tensor]:
        """Embeddings [1 or 2 (guidance), tokens, text_dim] of each text, on the CPU: other ranks and snapshots take
        them there without waiting for the device.

        Bits depend on the device, so what one has made is not taken for the other's.

        Args:
            texts: in any number; a repeated one is encoded once, if at all.
            beside: as in ``device``.

        Raises:
            ModelError, OSError: the encoder cannot be loaded.
        """
        setup, device = self._setup, self.device(beside)
        with self._lock:
            if isinstance(setup.source, ModelFiles):
                self._try_tokenizer(setup.source, device, texts)
            encoder = setup.source.family.prompt_encoder(
                lambda: setup.source.load_text_encoder(device, setup.dtype), device
            )
            found = []
            try:
                for text in texts:
                    key = device.type, text
                    embeds = self._kept.pop(key, None)
                    if embeds is None:
                        embeds = encoder.encode(*text).cpu()
                    if isinstance(setup.source, ModelFiles):
                        self._keep(key, embeds)
                    found.append(embeds)
            finally:
                encoder.free()
            return found

    def _try_tokenizer(self, source: ModelFiles, device: torch.device, texts: Sequence[Text]) -> None:
        new = [text for text in texts if (device.type, text) not in self._kept]
        words = [word for text in new for word in (text.prompt, text.negative_prompt) if word]
        if words:
            try_tokenizer(source.path / "tokenizer", words)

    def _keep(self, key: tuple[str, Text], embeds: torch.Tensor) -> None:
        self._kept[key] = embeds
        while sum(kept.nbytes for kept in self._kept.values()) > _MOST_BYTES:
            self._kept.popitem(last=False)


def texts_of(requests: Sequence[Request]) -> list[Text]:
    """The texts of all videos of a run, in the order of their requests and blocks; none where embeddings are given."""
    return [
        Text.of(request, prompt, request.negative_prompt) for request in requests for prompt in request.prompts.values()
    ]
