"""The server as a process: folder, engine and routes put together, and taken apart again at its end."""

from __future__ import annotations

import logging
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
        ValueError, RankFailed, OSError: the engine cannot start, or another server has the folder.
    """
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
            server.run()
            return server.started
        finally:
            runner.stop()
    finally:
        store.close()
