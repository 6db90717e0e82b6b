"""Headers, local edges, prompts: what is wrong on the wire is an error that names the edge."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dualparal.distributed.edges import LocalEdge
from dualparal.distributed.messages import Header, Kind, Lengths, TransportError, pack_header, unpack_header
from dualparal.distributed.prompts import PromptChannel
from dualparal.schedule.actions import Unit

numbers = st.integers(0, 2**40)
headers = st.builds(
    Header, st.sampled_from(Kind), st.builds(Unit, numbers, numbers, st.integers(0, 1), numbers), numbers
)


dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


@given(headers, numbers, dtypes)
def test_headers_survive_the_journey(header: Header, elements: int, dtype: torch.dtype) -> None:
    assert unpack_header(pack_header(header, elements, dtype), Lengths.fixed(elements), "edge", dtype) == header


@given(headers, st.integers(0, 9), st.integers(0, 62))
def test_a_flipped_bit_is_noticed(header: Header, field: int, bit: int) -> None:
    fields = pack_header(header, 10)
    fields[field] ^= 1 << bit
    with pytest.raises(TransportError, match="edge 0 -> 1"):
        unpack_header(fields, Lengths.fixed(10), "edge 0 -> 1")


@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=12))
def test_noise_is_no_header(values: list[int]) -> None:
    with pytest.raises(TransportError):
        unpack_header(torch.tensor(values, dtype=torch.int64), Lengths.fixed(10), "edge")


def test_a_tensor_of_another_size_is_noticed() -> None:
    with pytest.raises(TransportError, match="message of 12 elements, expected 10"):
        unpack_header(pack_header(Header(Kind.UNIT, Unit(0, 0, 0), 0), 12), Lengths.fixed(10), "edge")


def test_a_tensor_of_another_dtype_is_noticed() -> None:
    header = pack_header(Header(Kind.UNIT, Unit(0, 0, 0), 0), 10, torch.float16)
    with pytest.raises(TransportError, match=r"edge 0 -> 1: message of torch.float16, expected torch.float32"):
        unpack_header(header, Lengths.fixed(10), "edge 0 -> 1")


@pytest.mark.parametrize(
    ("tensor", "room"),
    [(torch.ones(5), 4), (torch.ones(2, 2), 3), (torch.ones(2, dtype=torch.float64), 4), (torch.ones(4).half(), 4)],
)
def test_what_does_not_fit_is_not_sent(tensor: torch.Tensor, room: int) -> None:
    edge = LocalEdge("edge 0 -> 1", Lengths.fixed(room + 1), 1, torch.float32, torch.device("cpu"))
    with pytest.raises(TransportError, match=rf"edge 0 -> 1: {tensor.dtype} .* to send where {room} elements"):
        edge.send(Header(Kind.UNIT, Unit(0, 0, 0), 0), tensor, torch.zeros(1))


ENDS = """
import json, os, sys, torch, torch.distributed as dist
from dualparal.schedule.actions import Unit
from dualparal.distributed.remote import EdgeGroups, ReceiveEdge, SendEdge
from dualparal.distributed.messages import Header, Kind, Lengths, TransportError
torch.set_num_threads(1)
path, rank, cases = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
store = dist.FileStore(path, 2)
dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
told, edges = [], []
for case in cases:
    elements, dtype = case[rank]
    group = dist.new_group([0, 1])
    common = (EdgeGroups(group, group), Lengths.fixed(elements), 2, 6, getattr(torch, dtype), torch.device("cpu"))
    edge = (SendEdge, ReceiveEdge)[rank]("edge 0 -> 1", 1 - rank, *common)
    edges.append(edge)
    try:
        for block in range(2):  # as many as there are buffers: nobody waits
            if rank == 0:
                tensor = torch.full((elements,), float(block), dtype=getattr(torch, dtype))
                edge.send(Header(Kind.UNIT, Unit(block, 0, 0), 0), tensor)
            else:
                header, tensor = edge.receive()
                assert header.unit.block == block and (tensor == block).all()
                edge.release()
        told.append("")
    except TransportError as error:
        told.append(str(error))
print(json.dumps(told), flush=True)
store.set(f"end{rank}", "1")
store.wait([f"end{1 - rank}"])
os._exit(0)
"""
DIFFERENT = {
    "message of 4096 elements, expected 64": ((4096, "float32"), (64, "float32")),
    "message of 64 elements, expected 4096": ((64, "float32"), (4096, "float32")),
    "message of torch.bfloat16, expected torch.float32": ((64, "bfloat16"), (64, "float32")),
    "message of torch.float16, expected torch.bfloat16": ((64, "float16"), (64, "bfloat16")),
}


def test_ends_that_differ_find_out_before_gloo_does(tmp_path: Path) -> None:
    """gloo aborts the process that is sent too much, and says nothing of the other cases."""
    cases = json.dumps([((64, "float32"), (64, "float32")), *DIFFERENT.values()])
    command = [sys.executable, "-c", ENDS, str(tmp_path / "store")]
    ends = [subprocess.Popen([*command, str(rank), cases], stdout=subprocess.PIPE, text=True) for rank in range(2)]
    try:
        sender, receiver = (json.loads(end.communicate(timeout=60)[0]) for end in ends)
    finally:
        for end in ends:
            end.kill()
    assert [end.returncode for end in ends] == [0, 0]
    assert sender == [""] * 5 and receiver[0] == ""
    for told, words in zip(receiver[1:], DIFFERENT, strict=True):
        assert told.startswith(f"edge 0 -> 1: {words}"), told


def test_a_local_edge_is_a_bounded_ring() -> None:
    edge = LocalEdge("edge 0 -> 1", Lengths.fixed(4), 2, torch.float32, torch.device("cpu"))
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


def test_a_message_is_as_long_as_its_unit() -> None:
    """And its mark lies behind that, not behind the longest."""
    lengths = Lengths(5, lambda unit: 3 if unit.block else 5)
    edge = LocalEdge("edge", lengths, 2, torch.float32, torch.device("cpu"))
    for block, tensor in enumerate((torch.ones(4), torch.ones(2))):
        edge.send(Header(Kind.UNIT, Unit(block, 0, 0), 0), tensor, torch.zeros(1))
    for length in (5, 3):
        made = edge.receive()[1]
        assert made.tolist() == [1.0] * (length - 1) + [0.0]
        edge.release()
    with pytest.raises(TransportError, match=r"edge: torch.float32 .* to send where 2 elements"):
        edge.send(Header(Kind.UNIT, Unit(1, 0, 0), 0), torch.ones(4), torch.zeros(1))


def test_sending_copies() -> None:
    edge = LocalEdge("edge", Lengths.fixed(4), 1, torch.float32, torch.device("cpu"))
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
