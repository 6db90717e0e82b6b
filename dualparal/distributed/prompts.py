"""The way of prompt embeddings to the stages."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from dualparal.distributed.messages import TransportError, guard


class PromptChannel:
    """Prompt embeddings from rank 0 to every other rank, in the order in which blocks first use them.

    In one process it is a dictionary. Between processes each prompt travels once, when stage 0 first runs a unit
    of it; a later stage asks for it when a header names a prompt it has not seen.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        rank: int,
        world_size: int,
        local_readers: int = 0,
    ) -> None:
        """Makes a channel; nothing travels yet.

        Args:
            shape: of a prompt's embeddings, [branches, tokens, text_dim].
            dtype: in which they travel.
            rank, world_size: this process among those of the run.
            local_readers: with one process, the number of stages that will fetch each prompt.
        """
        self.local_readers = local_readers
        self.rank = rank
        self.world_size = world_size
        self._shape, self._dtype = shape, dtype
        self._known: dict[int, tuple[torch.Tensor, int]] = {}  # embeddings, readers still to come
        self._pending: list[tuple[Any, torch.Tensor]] = []

    def publish(self, prompt: int, embeds: torch.Tensor) -> None:
        """Hands a prompt's embeddings [branches, tokens, text_dim] to all other stages. Called on rank 0.

        Raises PeerLost.
        """
        if self.world_size == 1:
            self._known[prompt] = embeds, self.local_readers
            return
        payload = embeds.to("cpu", self._dtype).contiguous()
        label = torch.tensor([prompt], dtype=torch.int64)
        self._pending = [(work, tensor) for work, tensor in self._pending if not work.is_completed()]
        for other in range(1, self.world_size):
            for tensor in (label, payload):
                self._pending.append((guard("prompt", dist.isend, tensor, other), tensor))

    def fetch(self, prompt: int) -> torch.Tensor:
        """Takes the embeddings [branches, tokens, text_dim] of ``prompt``, on the CPU between processes.

        Called on any other rank, or in one process for any other stage; once for each prompt, in their order.

        Raises:
            TransportError: rank 0 sends another prompt.
            PeerLost: rank 0 is gone.
        """
        if self.world_size == 1:
            embeds, readers = self._known.pop(prompt)
            if readers > 1:
                self._known[prompt] = embeds, readers - 1
            return embeds
        label = torch.zeros(1, dtype=torch.int64)
        payload = torch.empty(self._shape, dtype=self._dtype)
        for tensor in (label, payload):
            guard("prompt", dist.recv, tensor, 0)
        if label.item() != prompt:
            raise TransportError(f"rank {self.rank}: prompt {prompt} is wanted and prompt {label.item()} is sent")
        return payload

    def finish(self) -> None:
        """Waits until everything sent has left. Raises PeerLost."""
        for work, _ in self._pending:
            guard("prompt", work.wait)
        self._pending.clear()
