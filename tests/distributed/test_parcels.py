"""Parcels: what is no header of ours is refused; sizes and kinds of tensors arrive as they were."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from dualparal.distributed.messages import TransportError
from dualparal.distributed.parcels import ParcelLink, Sign, to_bytes, to_text


@pytest.fixture
def link(monkeypatch: pytest.MonkeyPatch) -> ParcelLink:
    """A link to itself: what is sent is received."""
    posted: list[torch.Tensor] = []

    class Done:
        def is_completed(self) -> bool:
            return True

        def wait(self, *_: object) -> None: ...

    def isend(tensor: torch.Tensor, *_: object, **__: object) -> Done:
        posted.append(tensor.clone())
        return Done()

    def irecv(tensor: torch.Tensor, *_: object, **__: object) -> Done:
        tensor.copy_(posted.pop(0))
        return Done()

    monkeypatch.setattr(dist, "isend", isend)
    monkeypatch.setattr(dist, "irecv", irecv)
    return ParcelLink("decoder 1 (rank 3)", 3, None)


@pytest.mark.parametrize("tensor", [
    torch.arange(24.0).view(1, 2, 3, 4, 1), torch.arange(6, dtype=torch.uint8).view(2, 3), torch.zeros(3, 0, 2),
    torch.arange(8.0).bfloat16().view(2, 4).t(), torch.tensor(2.5, dtype=torch.float16),
], ids=lambda tensor: str(list(tensor.shape)))  # fmt: skip
def test_a_tensor_arrives_as_it_was(link: ParcelLink, tensor: torch.Tensor) -> None:
    link.send(Sign.DECODE, 2, 7, tensor)
    found = link.receive()
    assert found[:3] == (Sign.DECODE, 2, 7) and found.tensor.dtype == tensor.dtype
    assert found.tensor.shape == tensor.shape and torch.equal(found.tensor, tensor)
    link.finish()


def test_a_text_arrives_as_it_was(link: ParcelLink) -> None:
    link.send(Sign.FAILED, tensor=to_bytes("größer"))
    assert to_text(link.receive().tensor) == "größer"
    link.send(Sign.STOP)
    assert link.receive().tensor.numel() == 0


@pytest.mark.parametrize("field", range(11))
def test_a_header_that_is_damaged_is_refused(link: ParcelLink, monkeypatch: pytest.MonkeyPatch, field: int) -> None:
    sent = dist.isend

    def isend(tensor: torch.Tensor, *rest: object, **more: object) -> object:
        if tensor.dtype == torch.int64:
            tensor[field] += 1
        return sent(tensor, *rest, **more)

    monkeypatch.setattr(dist, "isend", isend)
    link.send(Sign.DONE, 0, 1, torch.zeros(2))
    with pytest.raises(TransportError, match=r"decoder 1 \(rank 3\): message without a valid header"):
        link.receive()
