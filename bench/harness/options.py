"""The flags of the benches: the same flag means the same in each. See README.md."""

from __future__ import annotations

import argparse


def parser(doc: str | None, *, cpu: bool = False, seconds: float | None = None, repeats: int | None = None) -> (
    argparse.ArgumentParser
):  # fmt: skip
    """With ``--only`` and ``--no-record``, and those of ``--cpu``, ``--seconds`` and ``--repeats`` that a bench has.

    cpu: it can run on either. seconds, repeats: the defaults.
    """
    made = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    made.add_argument("--only", metavar="TEXT", default="", help="only rows with this in their name")
    made.add_argument("--no-record", action="store_true", help="print only, keep no rows")
    if cpu:
        made.add_argument("--cpu", action="store_true", help="small shapes in float32 on the CPU, one thread")
    if seconds is not None:
        made.add_argument(
            "--seconds", type=float, default=seconds, help="of measuring, per shape or in all (default: %(default)s)"
        )
    if repeats is not None:
        made.add_argument("--repeats", type=int, default=repeats, help="runs of each (default: %(default)s)")
    return made
