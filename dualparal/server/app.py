"""The routes: OpenAI's shape of videos, and what ours adds: change of prompt, stop, events, HLS, metrics, the page."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from dualparal.io.fragments import Fragment, fragment
from dualparal.io.video import segment_name
from dualparal.server.errors import ApiError
from dualparal.server.guard import COOKIE, Guard, cookie_of, same
from dualparal.server.jobs import Jobs
from dualparal.server.reference import check_reference
from dualparal.server.requests import read_request, read_text, shown
from dualparal.server.runner import Runner
from dualparal.server.store import COMPLETED, Video, as_openai

_PAGE = Path(__file__).parent / "page"
_FILES = {"page.css": "text/css", "page.js": "text/javascript", "timeline.js": "text/javascript"}
_LOOK_SECONDS = 0.2  # between two looks of a stream of events
_QUIET_LOOKS = 50  # after which it says that it is still there
_MOST_STREAMS = 64  # of events at once
_MOST_LISTED = 100
_MOST_FORMS = 8  # read at once: each may hold an image
_COOKIE_SECONDS = 30 * 86_400


def make_app(jobs: Jobs, runner: Runner) -> FastAPI:
    """The application: OpenAI's routes, ours, and the page, behind the guard."""
    app = FastAPI(title="dualparal", docs_url=None, redoc_url=None, openapi_url=None)
    routes = _Routes(jobs, runner)
    for method, path, handler in (
        ("POST", "/v1/videos", routes.create),
        ("GET", "/v1/videos", routes.list),
        ("GET", "/v1/videos/{video_id}", routes.retrieve),
        ("DELETE", "/v1/videos/{video_id}", routes.delete),
        ("GET", "/v1/videos/{video_id}/content", routes.content),
        ("POST", "/v1/videos/{video_id}/prompt", routes.prompt),
        ("POST", "/v1/videos/{video_id}/cancel", routes.cancel),
        ("GET", "/v1/videos/{video_id}/events", routes.events),
        ("GET", "/v1/videos/{video_id}/playlist.m3u8", routes.playlist),
        ("GET", "/v1/videos/{video_id}/init.mp4", routes.init),
        ("GET", "/v1/videos/{video_id}/segments/{number}.m4s", routes.segment),
        ("GET", "/v1/models", routes.models),
        ("GET", "/v1/server", routes.server),
        ("POST", "/session", routes.session),
        ("GET", "/healthz", routes.health),
        ("GET", "/metrics", routes.metrics),
        ("GET", "/", routes.index),
        ("GET", "/page/{name}", routes.page),
    ):
        app.add_api_route(path, handler, methods=[method], response_model=None)
    app.add_exception_handler(ApiError, _tell)
    app.add_exception_handler(HTTPException, _tell_http)
    app.add_exception_handler(Exception, _tell_unknown)
    app.add_middleware(Guard, settings=jobs.settings)
    return app


async def _tell(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError), "registered for it"
    return JSONResponse(error.body, error.status)


async def _tell_http(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException), "registered for it"
    return JSONResponse(ApiError(error.status_code, f"{error.detail}", code="http").body, error.status_code)


async def _tell_unknown(_: Request, error: Exception) -> Response:
    return JSONResponse(ApiError(500, f"an error of the server's own: {type(error).__name__}").body, 500)


async def _fields(request: Request) -> dict[str, Any]:
    """The fields of a body: JSON or a form. Raises ApiError (400)."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    try:
        if kind in ("multipart/form-data", "application/x-www-form-urlencoded"):
            async with request.form(max_files=1, max_fields=32, max_part_size=64 * 1024) as form:
                return {name: await _value(value) for name, value in form.items()}
        found = json.loads(await request.body() or b"{}")
    except (ValueError, RecursionError, HTTPException, KeyError, AssertionError):
        raise ApiError(400, "the body is neither a JSON object nor a form", code="invalid_body") from None
    if not isinstance(found, dict):
        raise ApiError(400, "the body is JSON, but no object", code="invalid_body")
    return found


async def _value(value: Any) -> Any:
    """A field of a form: a text, or the bytes of a file."""
    return await value.read() if isinstance(value, UploadFile) else value


class _Routes:
    """The handlers. What touches disk or waits for ranks runs on threads, so that no client waits for another."""

    def __init__(self, jobs: Jobs, runner: Runner) -> None:
        self._jobs, self._runner, self._streams = jobs, runner, 0
        self._forms = asyncio.Semaphore(_MOST_FORMS)

    async def _get(self, video_id: str) -> Video:
        """The video of an id, on a thread: the queue may wait for a slow disk. Raises ApiError (404)."""
        return await run_in_threadpool(self._jobs.get, video_id)

    def _told(self, video: Video) -> dict[str, Any]:
        return as_openai(video, self._jobs.settings.model_name)

    async def create(self, request: Request) -> Response:
        """Appends a video to the queue."""
        async with self._forms:
            fields = await _fields(request)
            wanted = read_request(fields, self._jobs.settings)
            image = fields.get("input_reference")
            if image is not None:
                await run_in_threadpool(check_reference, image)
            return JSONResponse(self._told(await run_in_threadpool(self._jobs.submit, wanted, image)))

    async def list(self, request: Request) -> Response:
        """A page of videos."""
        query = request.query_params
        limit, order = query.get("limit", "20"), query.get("order", "desc")
        if not limit.isdecimal() or len(limit) > 3 or not 1 <= int(limit) <= _MOST_LISTED:
            raise ApiError(400, f"limit: use a number from 1 to {_MOST_LISTED}", param="limit")
        if order not in ("asc", "desc"):
            raise ApiError(400, "order: use asc or desc", param="order")
        videos = await run_in_threadpool(self._jobs.all)
        if order == "asc":
            videos.reverse()
        if (after := query.get("after")) is not None:
            names = [video.id for video in videos]
            if after not in names:
                raise ApiError(404, "after: there is no video with this id", param="after", code="video_not_found")
            videos = videos[names.index(after) + 1 :]
        page = [self._told(video) for video in videos[: int(limit)]]
        return JSONResponse({
            "object": "list",
            "data": page,
            "has_more": len(videos) > len(page),
            "first_id": page[0]["id"] if page else None,
            "last_id": page[-1]["id"] if page else None,
        })  # fmt: skip

    async def retrieve(self, video_id: str) -> Response:
        """One video."""
        return JSONResponse(self._told(await self._get(video_id)))

    async def delete(self, video_id: str) -> Response:
        """Ends and removes a video."""
        await run_in_threadpool(self._jobs.delete, video_id)
        return JSONResponse({"id": video_id, "object": "video.deleted", "deleted": True})

    async def content(self, video_id: str, variant: str = "video") -> Response:
        """The finished file, also in parts (Range)."""
        video = await self._get(video_id)
        if variant != "video":
            raise ApiError(400, "variant: this server keeps the video only", param="variant")
        if video.status != COMPLETED:
            raise ApiError(409, f"this video is {video.status}: there is no file of it", code="video_not_ready")
        path = self._jobs.store.file(video)
        if not await run_in_threadpool(path.is_file):
            raise ApiError(404, "its file is gone", code="video_not_found")
        return FileResponse(path, media_type="video/mp4", filename=f"{video.id}.mp4",
                            content_disposition_type="inline")  # fmt: skip

    async def prompt(self, video_id: str, request: Request) -> Response:
        """Changes the prompt from the next block that can take it."""
        fields = await _fields(request)
        if unknown := set(fields) - {"prompt"}:
            raise ApiError(400, "only prompt can change", param=shown(min(unknown)), code="unknown_parameter")
        text = read_text(fields.get("prompt"), "prompt")
        block = await run_in_threadpool(self._jobs.set_prompt, video_id, text)
        return JSONResponse({"id": video_id, "object": "video.prompt", "block": block})

    async def cancel(self, video_id: str) -> Response:
        """Ends a video, and with it the run, when no other is made with it."""
        return JSONResponse(self._told(await run_in_threadpool(self._jobs.cancel, video_id)))

    async def events(self, video_id: str, request: Request) -> Response:
        """Events while a video is made: ``video``, its record, and ``spans``, what the ranks do."""
        video = await self._get(video_id)
        if self._streams >= _MOST_STREAMS:
            raise ApiError(429, f"{_MOST_STREAMS} streams of events are open, the limit; poll instead", code="streams")
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        return StreamingResponse(self._follow(video, request), media_type="text/event-stream", headers=headers)

    async def _follow(self, video: Video, request: Request) -> AsyncIterator[bytes]:
        if self._streams >= _MOST_STREAMS:  # of many that came at once
            return
        self._streams += 1
        try:
            last, seen, quiet = "", 0, 0
            while not self._jobs.ended and not await request.is_disconnected():
                try:
                    told = json.dumps(self._told(await self._get(video.id)))
                except ApiError:
                    yield b"event: deleted\ndata: {}\n\n"
                    return
                count, spans = await run_in_threadpool(self._jobs.spans, video, seen)
                seen = count if count else seen if video.is_over else 0
                quiet = 0 if spans or told != last else quiet + 1
                if spans:
                    yield b"event: spans\ndata: " + json.dumps(spans).encode() + b"\n\n"
                if told != last:
                    last = told
                    yield b"event: video\ndata: " + told.encode() + b"\n\n"
                elif quiet % _QUIET_LOOKS == _QUIET_LOOKS - 1:
                    yield b": here\n\n"
                if json.loads(told)["status"] in ("completed", "failed"):
                    return
                await asyncio.sleep(_LOOK_SECONDS)
        finally:
            self._streams -= 1

    async def playlist(self, video_id: str) -> Response:
        """The HLS playlist of the blocks that are finished."""
        video = await self._get(video_id)
        blocks = list(video.blocks)
        longest = max((count / video.fps for _, count in blocks), default=1)
        lines = ["#EXTM3U", "#EXT-X-VERSION:7", f"#EXT-X-TARGETDURATION:{int(longest) + 1}",
                 "#EXT-X-PLAYLIST-TYPE:EVENT", '#EXT-X-MAP:URI="init.mp4"']  # fmt: skip
        for number, (_, count) in enumerate(blocks):
            lines += [f"#EXTINF:{count / video.fps:.6f},", f"segments/{number}.m4s"]
        if video.is_over:
            lines.append("#EXT-X-ENDLIST")
        headers = {"cache-control": "no-store"}
        return Response("\n".join([*lines, ""]), media_type="application/vnd.apple.mpegurl", headers=headers)

    async def init(self, video_id: str) -> Response:
        """The header that all blocks of a video share."""
        return Response((await self._fragment(video_id, "0")).header, media_type="video/mp4")

    async def segment(self, video_id: str, number: str) -> Response:
        """A finished block as an fMP4 fragment."""
        return Response((await self._fragment(video_id, number)).media, media_type="video/iso.segment")

    async def _fragment(self, video_id: str, number: str) -> Fragment:
        video = await self._get(video_id)
        if not (number.isascii() and number.isdecimal()) or len(number) > 9 or int(number) >= len(video.blocks):
            raise ApiError(404, "there is no such block, or not yet", code="block_not_found")
        block = int(number)
        path = self._jobs.store.blocks(video) / segment_name(block)
        try:
            return await run_in_threadpool(fragment, path, video.blocks[block][0], block)
        except (OSError, ValueError):
            raise ApiError(404, "this block is gone", code="block_not_found") from None

    async def models(self) -> Response:
        """The one model, as OpenAI lists them."""
        data = [{"id": self._jobs.settings.model_name, "object": "model", "created": 0, "owned_by": "dualparal"}]
        return JSONResponse({"object": "list", "data": data})

    async def server(self) -> Response:
        """The defaults and limits that the page shows."""
        settings, waiting = self._jobs.settings, len(await run_in_threadpool(self._jobs.waiting))
        names = "fps", "seconds", "max_seconds", "steps", "max_steps", "guidance_scale", "gpus", "max_queue"
        counts = settings.image_counts
        images = "none" if 1 not in counts else "may" if 0 in counts else "must"
        rest = {
            "images": images,
            "model": settings.model_name,
            "size": f"{settings.width}x{settings.height}",
            "waiting": waiting,
        }
        return JSONResponse({**{name: getattr(settings, name) for name in names}, **rest, "up": self._runner.is_up})

    async def session(self, request: Request) -> Response:
        """Takes the token from the page and gives a cookie, which video elements and streams send, too."""
        token, given = self._jobs.settings.token, (await _fields(request)).get("token")
        if token is not None and not (isinstance(given, str) and same(given, token)):
            await asyncio.sleep(1)  # who guesses has to wait
            raise ApiError(401, "token: this is not the server's", param="token", code="invalid_api_key")
        answer = JSONResponse({"object": "session"})
        if token is not None:
            answer.set_cookie(COOKIE, cookie_of(token), _COOKIE_SECONDS, httponly=True, samesite="strict",
                              secure=request.url.scheme == "https")  # fmt: skip
        return answer

    async def health(self) -> Response:
        """200 while the ranks are there, 503 while they are not."""
        up = self._runner.is_up
        return JSONResponse({"status": "ok" if up else "starting"}, 200 if up else 503)

    async def metrics(self) -> Response:
        """Figures for Prometheus."""
        return Response(self._jobs.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def index(self) -> Response:
        """The page."""
        return FileResponse(_PAGE / "index.html", media_type="text/html", headers={"cache-control": "no-cache"})

    async def page(self, name: str) -> Response:
        """A file of the page."""
        if name not in _FILES:
            raise ApiError(404, "there is no such file", code="http")
        return FileResponse(_PAGE / name, media_type=_FILES[name], headers={"cache-control": "no-cache"})
