"""The server as a process: folder, engine and routes put together, and taken apart again at its end."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from dualparal.models.folder import folder_of
from dualparal.models.json_files import ModelError
from dualparal.models.registry import folder_sizes
from dualparal.server.app import make_app
from dualparal.server.jobs import Jobs
from dualparal.server.metrics import Metrics
from dualparal.server.runner import Runner
from dualparal.server.settings import Settings
from dualparal.server.store import Store

logger = logging.getLogger("dualparal")

_LEAVE_SECONDS = 2  # for open streams and downloads at the end
_MOST_CONNECTIONS = 512
_HEAD_SECONDS = 15.0  # in which a connection has sent the head of its next request


class _Patient(H11Protocol):
    """uvicorn's protocol, which leaves who connects and does not ask: such would keep others out."""

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._late is not None:
            self._late.cancel()

    @property
    def _asks(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _wait(self) -> None:
        """Starts the clock where none runs, and stops it while a request is answered."""
        if self._asks and self._late is not None:
            self._late.cancel()
            self._late = None
        elif not self._asks and self._late is None:
            self._late = self.loop.call_later(_HEAD_SECONDS, self._leave)

    def _leave(self) -> None:
        if not self._asks:
            self.transport.close()


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
        settings = replace(settings, image_counts=_image_counts(settings))
        runner = Runner(jobs := Jobs(store, settings, Metrics()))
        try:
            runner.start()
            config = uvicorn.Config(
                make_app(jobs, runner),
                host=settings.host,
                port=settings.port,
                http=_Patient,
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


def _image_counts(settings: Settings) -> tuple[int, ...]:
    """The numbers of images that the model takes; none where nothing is known of it here, as the ranks will say."""
    try:
        sizes = folder_sizes(folder_of(settings.model, settings.engine.transformers), settings.engine.transformers)
    except ModelError:
        return (0,)
    return tuple(sizes.image_counts)


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
