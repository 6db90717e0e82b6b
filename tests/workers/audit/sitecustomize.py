"""Takes down what this process unpickles, executes and connects to; Python runs it when this folder is on PYTHONPATH.

``AUDIT_FOLDER`` gets a file for each process, with a line for each event; ``AUDIT_ROOTS`` says whose code is ours.
"""

import os
import sys
from typing import Any

_log = os.open(
    os.path.join(os.environ["AUDIT_FOLDER"], f"{os.getpid()}.txt"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600
)
_roots = tuple(os.path.join(root, "") for root in os.environ["AUDIT_ROOTS"].split(os.pathsep))
_LOCAL = ("127.0.0.1", "::1", "localhost")
_IMPORT = "<frozen importlib._bootstrap_external>"  # reads .pyc files, whose code is then executed and seen


def _listen(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "pickle.find_class":
        _note(event, ".".join(map(str, arguments)))
    elif event in ("marshal.loads", "marshal.load") and sys._getframe(1).f_code.co_filename != _IMPORT:
        _note(event, sys._getframe(1).f_code.co_filename)
    elif event == "socket.connect" and isinstance(arguments[1], tuple) and arguments[1][0] not in _LOCAL:
        _note(event, str(arguments[1][0]))
    elif event == "exec":
        name = getattr(arguments[0], "co_filename", "<string>")
        if not name.startswith("<") and not os.path.realpath(name).startswith(_roots):
            _note(event, name)


def _note(event: str, detail: str) -> None:
    os.write(_log, f"{event} {detail}\n".encode())


sys.addaudithook(_listen)
