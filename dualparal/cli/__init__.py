"""The command line: flags to a job, a job to an engine."""

import os
import sys


def _leave_out_the_current_folder() -> None:
    """Drops the current folder from where modules are looked for, if an empty element of PYTHONPATH put it there.

    It may be a model's. A colon too many is no wish: who wants it says "." or starts with ``python -m``.
    """
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if "" not in given or given == [""]:
        return
    rest = [entry for entry in given if entry]
    os.environ["PYTHONPATH"] = os.pathsep.join(rest)  # for the ranks
    here = os.getcwd()
    if here not in map(os.path.abspath, rest):
        sys.path[1:] = [entry for entry in sys.path[1:] if entry and os.path.abspath(entry) != here]


_leave_out_the_current_folder()
