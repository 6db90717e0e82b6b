"""A few thousand random inputs for each target of ``tests/helpers/fuzz.py``, and that it tells a crash from a hang."""

from __future__ import annotations

from pathlib import Path

import pytest

import fuzz

INPUTS = {"config": 5000, "argv": 2000, "header": 5000, "latents": 1500, "snapshot": 600, "extension": 5000}


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_only_errors_of_ours_come_out(name: str) -> None:
    # Another seed than the long run's, so that both together see more.
    outcome = fuzz.run_target(name, 1, range(INPUTS.get(name, 1000)))
    assert outcome.failure == ""
    assert outcome.accepted + outcome.refused == outcome.inputs
    # Neither all right nor all wrong: it reaches what lies behind the first check.
    assert 0.02 < outcome.accepted / outcome.inputs < 0.98
    assert outcome.slowest < 5


# What a target may do, and how it is told.
MISDEEDS = {
    "os.kill(os.getpid(), 11)": "input 7 ends the process with -11",
    "time.sleep(60)": "input 7 hangs for more than 2 s",
    "raise KeyError": "input 7 ends the process with 1",
    "bytearray(b'x') * (600 << 20)": "memory grew by",
}


@pytest.mark.parametrize("misdeed", MISDEEDS)
def test_a_crash_a_hang_a_foreign_error_and_memory_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, misdeed: str
) -> None:
    """In a copy of fuzz.py with one more target."""
    more = f"""
@target
def bad(folder):
    calls = itertools.count()
    def feed(rng):
        if next(calls) == 7:
            {misdeed}
        raise ValueError
    return feed, (ValueError,)

if __name__ == "__main__":"""
    copy = tmp_path / "one_more_target.py"
    copy.write_text(Path(fuzz.__file__).read_text(encoding="utf-8").replace('\nif __name__ == "__main__":', more))
    monkeypatch.setattr(fuzz, "HANG_SECONDS", 2.0)
    monkeypatch.setattr(fuzz, "__file__", str(copy))
    assert MISDEEDS[misdeed] in fuzz.run_target("bad", 0, range(20)).failure


def test_an_input_is_the_same_again(tmp_path: Path) -> None:
    one, two = (fuzz.feed_inputs("config", 3, range(50), tmp_path, id) for _ in range(2))
    assert (one.accepted, one.refused) == (two.accepted, two.refused)
