"""How long calls take on a CUDA device: events around eager calls, and replays of a captured graph.

Calls are made in turn, so that calls on different weights find none of them in the cache. Eager times contain what the
host adds when it is slower than the device; a graph's do not.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

__all__ = ["Clock", "CudaClock"]

Call = Callable[[], Any]


class Clock(Protocol):
    """Measures microseconds of one call of a list of equal calls."""

    def eager(self, calls: Sequence[Call], seconds: float) -> float:
        """Median of calls made from the host."""

    def graph(self, calls: Sequence[Call], seconds: float) -> float | None:
        """Median of calls replayed from a CUDA graph; None when they cannot be captured."""


class CudaClock:
    """The clock of the current CUDA device."""

    #: Measurements at least, however short the time.
    least = 5

    def eager(self, calls: Sequence[Call], seconds: float) -> float:
        """See `Clock`: each measurement is one round over all calls."""

        def play() -> None:
            for call in calls:
                call()

        play()
        return self._median(play, len(calls), seconds)

    def graph(self, calls: Sequence[Call], seconds: float) -> float | None:
        """See `Clock`: one graph holds a round over all calls."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in calls:  # whatever is set up at a first call is set up outside the graph
                call()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        captured = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(captured):
                kept = [call() for call in calls]
        except RuntimeError:
            torch.cuda.synchronize()
            return None
        captured.replay()
        found = self._median(captured.replay, len(calls), seconds)
        del kept
        return found

    def _median(self, play: Call, count: int, seconds: float) -> float:
        """Median microseconds of ``play`` divided by ``count``; it runs for about ``seconds``."""
        once = self._timed(play, 1)[0]
        rounds = max(self.least, min(1000, int(seconds * 1e6 / max(once, 1.0))))
        return statistics.median(self._timed(play, rounds)) / count

    @staticmethod
    def _timed(play: Call, rounds: int) -> list[float]:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
        events[0].record()
        for event in events[1:]:
            play()
            event.record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) * 1e3 for a, b in itertools.pairwise(events)]
