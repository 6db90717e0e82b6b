"""The server as a process: folder, engine and routes put together, and taken apart again at its end."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable

import uvicorn

from dualparal.server.app import make_app
from dualparal.server.jobs import Jobs
from dualparal.server.metrics import Metrics
from dualparal.server.runner import Runner
from dualparal.server.settings import Settings
from dualparal.server.store import Store

logger = logging.getLogger("dualparal")

_LEAVE_SECONDS = 2  # for open streams and downloads at the end
_MOST_CONNECTIONS = 512


class _Server(uvicorn.Server):
    """uvicorn, which ends streams of events before it waits for them, and says when it listens."""

    def __init__(self, config: uvicorn.Config, jobs: Jobs, say: Callable[[int], None]) -> None:
        super().__init__(config)
        self._jobs, self._say = jobs, say

    async def startup(self, sockets: list[object] | None = None) -> None:  # type: ignore[override]
        await super().startup(sockets)  # type: ignore[arg-type]
        if self.started:
            self._say(self.servers[0].sockets[0].getsockname()[1])

    async def shutdown(self, sockets: list[object] | None = None) -> None:  # type: ignore[override]
        self._jobs.end()
        await super().shutdown(sockets)  # type: ignore[arg-type]


def serve(settings: Settings, say: Callable[[int], None]) -> bool:
    """Serves until a signal ends it; what is under way is gone on with at the next start.

    Args:
        settings: of the server.
        say: called with the port when clients may come.

    Returns:
        False: it could not listen, which uvicorn has said.

    Raises:
        ValueError: the address is taken, another server has the folder, or the model or an option cannot be used.
        RankFailed, OSError: the ranks cannot start.
    """
    address = _bind(settings)  # before what takes long
    store = Store(settings.folder)
    try:
        runner = Runner(jobs := Jobs(store, settings, Metrics()))
        try:
            runner.start()
            config = uvicorn.Config(
                make_app(jobs, runner),
                host=settings.host,
                port=settings.port,
                log_level="warning",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_graceful_shutdown=_LEAVE_SECONDS,
                limit_concurrency=_MOST_CONNECTIONS,
                h11_max_incomplete_event_size=64 * 1024,
            )
            server = _Server(config, jobs, say)
            server.run([address])
            return server.started
        finally:
            runner.stop()
    finally:
        store.close()
        address.close()


def _bind(settings: Settings) -> socket.socket:
    """A socket at the server's address, which does not listen yet. Raises ValueError: it cannot be had."""
    found = socket.socket(socket.AF_INET6 if ":" in settings.host else socket.AF_INET)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((settings.host, settings.port))
    except OSError as error:
        found.close()
        raise ValueError(
            f"--host {settings.host} --port {settings.port}: cannot listen there ({error.strerror}); use another "
            "port, or 0 for one that is free"
        ) from None
    return found
