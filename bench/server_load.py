"""The server under load: many clients at once, some of whom stop their videos, and a rank that is killed in between.

Ends with an error unless every client was answered, nothing was lost, the queue kept to its limit and no rank is left.
Prints figures; they are in docs/server.md.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

_MIB = 1 << 20


class Load:
    """Clients of one server, and what they saw."""

    def __init__(self, url: str, clients: int, requests: int, seconds: float, cancel: int) -> None:
        self.url, self.clients, self.seconds, self.cancel = url, clients, seconds, cancel
        self.left = list(range(requests))
        self.ends: Counter[str] = Counter()
        self.refused = 0
        self.stops: list[float] = []
        self.wrong: list[str] = []
        self.lock = threading.Lock()

    def call(self, method: str, path: str, body: Any = None) -> bytes:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"content-type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=120) as answer:
            return bytes(answer.read())

    def told(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.call(method, path, body))
        return found

    def client(self) -> None:
        while True:
            with self.lock:
                if not self.left:
                    return
                number = self.left.pop(0)
            try:
                self.one(number)
            except Exception as error:
                with self.lock:
                    self.wrong.append(f"request {number}: {error!r}")

    def one(self, number: int) -> None:
        body = {"prompt": f"{number % 4 + 1} red circles on a dark background", "seconds": self.seconds, "seed": number}
        while True:
            try:
                video = self.told("POST", "/v1/videos", body)
                break
            except urllib.error.HTTPError as error:
                if error.code != 429:
                    raise
                with self.lock:
                    self.refused += 1
                time.sleep(1)
        stop = number % self.cancel == self.cancel - 1
        while (video := self.told("GET", "/v1/videos/" + video["id"]))["status"] in ("queued", "in_progress"):
            if stop and video["status"] == "in_progress":
                begun = time.monotonic()
                self.told("POST", f"/v1/videos/{video['id']}/cancel")
                with self.lock:
                    self.stops.append(time.monotonic() - begun)
            time.sleep(0.5)
        end = (video["error"] or {}).get("code", video["status"])
        if end == "completed" and b"moov" not in self.call("GET", f"/v1/videos/{video['id']}/content"):
            end = "broken file"
        with self.lock:
            self.ends[end] += 1


def main() -> None:
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("--clients", type=int, default=20)
    made.add_argument("--requests", type=int, default=100)
    made.add_argument("--gpus", type=int, default=2)
    made.add_argument("--steps", type=int, default=1, help="with fewer steps than stages videos are made together")
    made.add_argument("--video-seconds", type=float, default=0.3)
    made.add_argument("--max-queue", type=int, default=12)
    made.add_argument("--cancel", type=int, default=7, help="every so manieth video is stopped while it is made")
    flags = made.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", "from dualparal.cli.main import main; main()", "serve", "--device", "cpu",
                   "--gpus", str(flags.gpus), "--port", "0", "--steps", str(flags.steps), "--out-dir", folder,
                   "--max-queue", str(flags.max_queue), "--frames-per-block", "2", "--context-frames", "1"]  # fmt: skip
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            url = re.search(r"http://\S+", line)
            assert url, f"no server: {line}"
            load = Load(url[0], flags.clients, flags.requests, flags.video_seconds, flags.cancel)
            sys.exit(run(load, process, flags.requests, flags.max_queue, Path(folder)))
        finally:
            process.kill()


def run(load: Load, process: subprocess.Popen[str], requests: int, max_queue: int, folder: Path) -> int:
    """Runs the clients, kills a rank, ends the server. Returns the exit code."""
    server = psutil.Process(process.pid)
    begun, rss, queue, killed = time.monotonic(), [server.memory_info().rss], [0.0], 0
    threads = [threading.Thread(target=load.client) for _ in range(load.clients)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        rss.append(server.memory_info().rss)
        text = load.call("GET", "/metrics").decode()
        queue.append(max(float(each) for each in re.findall(r"^dualparal_queue_length (\S+)", text, re.MULTILINE)))
        if not killed and sum(load.ends.values()) > requests // 3:
            ranks = [each for each in server.children() if "RANK" in each.environ()]
            os.kill(ranks[-1].pid, signal.SIGKILL)
            killed = ranks[-1].pid
        time.sleep(1)
    seconds = time.monotonic() - begun
    figures = {name: float(value) for name, value in re.findall(r"^(dualparal_\w+) (\S+)", text, re.MULTILINE)}
    listed = load.told("GET", "/v1/videos?limit=100")
    children = server.children(recursive=True)
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    _, alive = psutil.wait_procs(children, timeout=5)
    done = sum(load.ends.values())
    print(f"{load.clients} clients, {requests} requests in {seconds:.0f} s: {dict(load.ends)}, {load.refused} refusals "
          f"of a full queue that were asked again")  # fmt: skip
    print(f"queue at most {max(queue):.0f} of {max_queue}; server's memory {rss[0] / _MIB:.0f} MiB at first, at most "
          f"{max(rss) / _MIB:.0f}, {rss[-1] / _MIB:.0f} at the end; ranks were started "
          f"{figures['dualparal_engine_starts_total']:.0f} times; rank failures "
          f"{figures['dualparal_rank_failures_total']:.0f}")  # fmt: skip
    runs = len(list((folder / "runs").iterdir()))
    slowest = max(load.stops, default=0)
    print(f"stops answered after {slowest:.2f} s at most; processes left: {len(alive)}; runs left on disk: {runs}")
    wrong = [*load.wrong]
    wrong += [f"{done} of {requests} have an end"] * (done != requests)
    wrong += [f"ends: {dict(load.ends)}"] * bool(set(load.ends) - {"completed", "cancelled"})
    wrong += [f"{len(listed['data'])} are listed"] * (len(listed["data"]) != min(100, requests))
    wrong += ["the queue was longer than its limit"] * (max(queue) > max_queue)
    wrong += ["processes are left"] * bool(alive) + ["no rank was killed"] * (not killed)
    for each in wrong:
        print("not so:", each)
    return 1 if wrong else 0


if __name__ == "__main__":
    main()
