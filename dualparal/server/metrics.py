"""Figures of a server for Prometheus, in a registry of its own."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.process_collector import ProcessCollector

_MINUTES = (1, 5, 15, 60, 300, 900, 3600, 14400)


class Metrics:
    """Counts and gauges; ``text`` is what ``/metrics`` answers."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)  # memory and descriptors of this process
        self.videos = Counter("dualparal_videos", "Videos by their end", ["end"], registry=registry)
        for end in ("completed", "failed", "cancelled"):
            self.videos.labels(end)
        self.refused = Counter("dualparal_refused", "Requests for videos that a full queue refused", registry=registry)
        self.frames = Counter("dualparal_frames", "Frames that are finished", registry=registry)
        self.blocks = Counter("dualparal_blocks", "Blocks that are finished", registry=registry)
        self.starts = Counter("dualparal_engine_starts", "Times that ranks were started", registry=registry)
        self.failures = Counter("dualparal_rank_failures", "Runs that a failed rank ended", registry=registry)
        self.queue = Gauge("dualparal_queue_length", "Videos that wait", registry=registry)
        self.running = Gauge("dualparal_running_videos", "Videos that are being made", registry=registry)
        self.busy = Gauge("dualparal_engine_busy", "1 until the engine has let go of a run", registry=registry)
        self.up = Gauge("dualparal_engine_up", "1 when the ranks are there", registry=registry)
        self.seconds = Histogram(
            "dualparal_video_seconds", "Seconds from a video's start to its end", buckets=_MINUTES, registry=registry
        )

    def text(self) -> bytes:
        """All figures in Prometheus' text format."""
        return generate_latest(self._registry)
