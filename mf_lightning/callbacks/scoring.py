"""Feature extraction beside generation: the next batch is drawn while the last one is scored."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from types import TracebackType

import torch

AHEAD = 2
"""Batches of pictures that may wait."""


class Beside:
    """Does jobs in order, on a GPU in a thread with a stream of its own, elsewhere at once.

    On a CPU both would share the same cores: a thread was measured to gain nothing there.

    Args:
        device: that the jobs compute on.
        threaded: whether a thread does them; None is on a GPU only.
    """

    def __init__(self, device: torch.device, *, threaded: bool | None = None) -> None:
        self.device = device
        self._error: BaseException | None = None
        self._jobs: queue.Queue[tuple[Callable[[], None], torch.cuda.Event | None] | None] | None = None
        self._on_gpu = device.type == "cuda"
        if self._on_gpu if threaded is None else threaded:
            self._jobs = queue.Queue(AHEAD)
            self._thread = threading.Thread(target=self._work, name="scoring", daemon=True)
            self._thread.start()

    def __enter__(self) -> Beside:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._jobs is not None:
            self._jobs.put(None)
            self._thread.join()
        if error is None:
            self._raise()

    def do(self, job: Callable[[], None]) -> None:
        """Take a job on; what an earlier one raised is raised here."""
        self._raise()
        if self._jobs is None:
            job()
            return
        ready = torch.cuda.Event() if self._on_gpu else None
        if ready is not None:
            ready.record()  # behind everything that made the job's tensors
        self._jobs.put((job, ready))

    def wait(self) -> None:
        """Wait until all jobs are done."""
        if self._jobs is not None:
            self._jobs.join()
        self._raise()

    def _work(self) -> None:
        stream = None
        if self._on_gpu:
            torch.cuda.set_device(self.device)
            stream = torch.cuda.Stream(self.device)
        while (found := self._jobs.get()) is not None:
            job, ready = found
            try:
                if self._error is None and stream is None:
                    job()
                elif self._error is None:
                    with torch.cuda.stream(stream):
                        stream.wait_event(ready)
                        job()
                        stream.synchronize()  # the job's tensors may be freed after it
            except BaseException as error:  # raised again by whoever waits
                self._error = error
            self._jobs.task_done()

    def _raise(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error
