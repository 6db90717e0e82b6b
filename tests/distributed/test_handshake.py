"""Ranks as threads over torch's own stores: one shared object, and one file with an object per rank."""

import threading
import time

import pytest
import torch.distributed as dist

from dualparal.distributed.handshake import gather, handshake

INFO = {
    "dualparal": "0.1.0",
    "torch": "2.13.0",
    "dtype": "bf16",
    "args": {"height": 480, "sizes": [1, 2]},
}


@pytest.fixture(params=["hash", "file"])
def open_store(request, tmp_path):
    """A function that opens the store for one rank."""
    if request.param == "hash":
        store = dist.HashStore()
        return lambda: store
    return lambda: dist.FileStore(str(tmp_path / "store"), -1)


def at_once(rank_main, items):
    """Every rank in a thread of its own, to its end."""
    threads = [threading.Thread(target=rank_main, args=item) for item in items]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def meet(open_store, infos, *, timeout=5.0, world_sizes=None, delays=None):
    """Runs one thread per entry of `infos` (rank: info); returns what each raised, or None."""
    outcome: dict[int, Exception | None] = {}

    def rank_main(rank, info):
        time.sleep((delays or {}).get(rank, 0))
        world_size = (world_sizes or {}).get(rank, 3)
        try:
            handshake(open_store(), rank, world_size, info, timeout)
            outcome[rank] = None
        except Exception as error:
            outcome[rank] = error

    at_once(rank_main, infos.items())
    return outcome


def the_one_text(outcome, kind):
    """All ranks raised `kind` with the same words."""
    assert {type(error) for error in outcome.values()} == {kind}
    (text,) = {str(error) for error in outcome.values()}
    return text


def test_ranks_that_agree_go_on(open_store):
    start = time.monotonic()
    assert meet(open_store, {rank: INFO for rank in range(3)}) == {0: None, 1: None, 2: None}
    assert time.monotonic() - start < 5.0  # the timeout: nobody waited for it


def test_one_rank_alone(open_store):
    assert meet(open_store, {0: INFO}, world_sizes={0: 1}) == {0: None}


def test_every_difference_is_named_with_its_values_on_every_rank(open_store):
    other = {**INFO, "torch": "2.12.1", "args": {"height": 720, "sizes": [1, 2]}}
    outcome = meet(open_store, {0: INFO, 1: other, 2: INFO}, delays={2: 0.3})
    assert the_one_text(outcome, ValueError) == (
        'ranks disagree: args.height: rank 0, 2 = 480, rank 1 = 720; torch: rank 0, 2 = "2.13.0", rank 1 = "2.12.1"'
    )


def test_the_rank_that_hosts_the_store_stays_until_the_others_have_read():
    """It finds the difference first, and the store ends with it."""
    hosted, over = dist.HashStore(), threading.Event()

    class Guest:
        """The store as another rank sees it, whose reading takes a while."""

        set = staticmethod(hosted.set)

        def check(self, keys):
            if over.is_set():
                raise ConnectionError("the store is gone")
            return hosted.check(keys)

        def get(self, key):
            time.sleep(0.1)
            if over.is_set():
                raise ConnectionError("the store is gone")
            return hosted.get(key)

    def open_for(rank):
        return hosted if rank == 0 else Guest()

    outcome: dict[int, Exception] = {}

    def rank_main(rank):
        try:
            handshake(open_for(rank), rank, 2, {"a": rank}, 5.0)
        except Exception as error:
            outcome[rank] = error
        if rank == 0:
            over.set()

    at_once(rank_main, [(0,), (1,)])
    assert the_one_text(outcome, ValueError) == "ranks disagree: a: rank 0 = 0, rank 1 = 1"


def test_a_field_that_one_rank_lacks_is_a_difference(open_store):
    outcome = meet(open_store, {0: INFO, 1: INFO, 2: {**INFO, "nccl": "2.29"}})
    assert the_one_text(outcome, ValueError) == 'ranks disagree: nccl: rank 0, 1 = absent, rank 2 = "2.29"'


def test_values_of_different_type_are_different(open_store):
    outcome = meet(open_store, {0: {"a": 1}, 1: {"a": "1"}, 2: {"a": None}})
    assert the_one_text(outcome, ValueError) == ('ranks disagree: a: rank 0 = 1, rank 1 = "1", rank 2 = null')


@pytest.mark.parametrize("wrong", [2, 4])
def test_wrong_world_size_is_a_difference_and_no_wait(open_store, wrong):
    start = time.monotonic()
    outcome = meet(open_store, {rank: INFO for rank in range(3)}, world_sizes={1: wrong}, timeout=30)
    text = the_one_text(outcome, ValueError)
    assert text.startswith("ranks disagree: world_size: ") and f"rank 1 = {wrong}" in text
    assert time.monotonic() - start < 15.0  # half of the timeout


def test_missing_rank_is_named(open_store):
    outcome = meet(open_store, {0: INFO, 2: INFO}, timeout=0.5)
    assert the_one_text(outcome, TimeoutError) == "rank(s) [1] did not report within 0.5 s"


def test_late_rank_is_waited_for(open_store):
    assert meet(open_store, {rank: INFO for rank in range(3)}, delays={1: 0.5}) == {0: None, 1: None, 2: None}


# --- what a run cost, told to rank 0 ---


def gathered(open_store, delays, **limits):
    """What `gather` gave or raised on each of three ranks, each of which comes after its delay, and when."""
    outcome = {}

    def rank_main(rank, delay):
        time.sleep(delay)
        try:
            outcome[rank] = gather(open_store(), rank, 3, [rank, 0.5], **limits)
        except Exception as error:
            outcome[rank] = error
        outcome[rank] = outcome[rank], time.monotonic()

    at_once(rank_main, delays.items())
    return outcome


def test_rank_0_hears_all_and_the_others_wait_for_it(open_store):
    begin = time.monotonic()
    outcome = gathered(open_store, {0: 0.4, 1: 0, 2: 0.2})
    assert {rank: value for rank, (value, _) in outcome.items()} == {
        0: [[0, 0.5], [1, 0.5], [2, 0.5]], 1: None, 2: None,
    }  # fmt: skip
    assert min(at for _, at in outcome.values()) - begin >= 0.4


def test_who_does_not_come_to_the_end_is_named(open_store):
    (error, _), (nothing, _) = gathered(open_store, {0: 0, 2: 0}, timeout=0.3).values()
    if nothing is not None:
        error, nothing = nothing, error
    assert nothing is None and type(error) is TimeoutError
    assert str(error) == "rank(s) [1] did not come to the end of the run within 0.3 s"


def test_patience_with_rank_0_has_an_end(open_store):
    ((error, _),) = gathered(open_store, {1: 0}, patience=0.3).values()
    assert str(error) == "rank(s) [0] did not come to the end of the run within 0.3 s"
