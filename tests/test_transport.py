"""Headers, local edges, prompts: what is wrong on the wire is an error that names the edge."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dualparal.schedule import Unit
from dualparal.transport import Header, Kind, LocalEdge, PromptChannel, TransportError, pack_header, unpack_header

numbers = st.integers(0, 2**40)
headers = st.builds(
    Header, st.sampled_from(Kind), st.builds(Unit, numbers, numbers, st.integers(0, 1), numbers), numbers
)


@given(headers, numbers)
def test_headers_survive_the_journey(header: Header, elements: int) -> None:
    assert unpack_header(pack_header(header, elements), elements, "edge") == header


@given(headers, st.integers(0, 8), st.integers(0, 62))
def test_a_flipped_bit_is_noticed(header: Header, field: int, bit: int) -> None:
    fields = pack_header(header, 10)
    fields[field] ^= 1 << bit
    with pytest.raises(TransportError, match="edge 0 -> 1"):
        unpack_header(fields, 10, "edge 0 -> 1")


@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=12))
def test_noise_is_no_header(values: list[int]) -> None:
    with pytest.raises(TransportError):
        unpack_header(torch.tensor(values, dtype=torch.int64), 10, "edge")


def test_a_tensor_of_another_size_is_noticed() -> None:
    with pytest.raises(TransportError, match="message of 12 elements, expected 10"):
        unpack_header(pack_header(Header(Kind.UNIT, Unit(0, 0, 0), 0), 12), 10, "edge")


def test_a_local_edge_is_a_bounded_ring() -> None:
    edge = LocalEdge("edge 0 -> 1", 4, 2, torch.float32, torch.device("cpu"))
    for step in range(5):
        assert edge.can_send() and not edge.can_receive()
        for block in range(2):
            edge.send(Header(Kind.UNIT, Unit(block, step, 0), 0), torch.full((4,), 10.0 * step + block))
        assert not edge.can_send()
        for block in range(2):
            header, tensor = edge.receive()
            assert header.unit == Unit(block, step, 0) and (tensor == 10.0 * step + block).all()
            assert not edge.can_send() or block == 1, "a buffer being read is not free"
            edge.release()


def test_sending_copies() -> None:
    edge = LocalEdge("edge", 4, 1, torch.float32, torch.device("cpu"))
    tensor = torch.ones(2, 2)
    edge.send(Header(Kind.UNIT, Unit(0, 0, 0), 0), tensor)
    tensor.zero_()
    assert (edge.receive()[1] == 1).all()


def test_local_prompts_are_forgotten_after_the_last_reader() -> None:
    channel = PromptChannel((1, 2, 3), torch.float32, rank=0, world_size=1, local_readers=2)
    embeds = torch.ones(1, 2, 3)
    channel.publish(4, embeds)
    assert channel.fetch(4) is embeds and channel.fetch(4) is embeds
    with pytest.raises(KeyError):
        channel.fetch(4)
