"""A function in a process of its own, with a time limit: a hang or a crash there is a result, not an accident.

The processes are forked from a server that has imported the heavy packages once, so starting one costs nothing that
the function's own clock would see.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import signal
import sys
import time
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.harness import Json

__all__ = ["call"]

Row = dict[str, Json]


def call(function: Callable[..., Row], *arguments: Any, seconds: float, threads: int = 1) -> Row:
    """``function(*arguments)`` in a new process.

    Args:
        function: Of a module's top level; gives what JSON can hold.
        *arguments: For the function; they are pickled.
        seconds: The process is killed after that.
        threads: Of torch in that process.

    Returns:
        The function's row, with its peak memory; ``{"status": "timeout"}`` or ``{"status": "crash", "error": ...}``.
    """
    os.environ["OMP_NUM_THREADS"] = str(threads)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch_pruning", "fxcompress.capture", "benchmarks.models"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, function, arguments, threads))
    begin = time.perf_counter()
    process.start()
    sender.close()
    try:
        if not receiver.poll(seconds):
            return {"status": "timeout", "seconds": round(time.perf_counter() - begin, 1)}
        found: Row = receiver.recv()
        return found
    except EOFError:
        process.join()
        return {"status": "crash", "error": f"the process died with exit status {process.exitcode}"}
    finally:
        if process.is_alive() and process.pid is not None:
            process.join(2)
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        process.join()


def _child(sender: Connection, function: Callable[..., Row], arguments: tuple[Any, ...], threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    sys.setrecursionlimit(100_000)
    try:
        with open(os.devnull, "w", encoding="utf-8") as nothing, contextlib.redirect_stdout(nothing):
            row = dict(function(*arguments))
    except Exception as error:  # noqa: BLE001 - whatever stops the contestant is its result
        row = {"status": "crash", "error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    row["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    sender.send(row)
