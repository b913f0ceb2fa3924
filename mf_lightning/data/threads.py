"""Work done ahead by threads: batches in their order, shards on their way."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


class Threads:
    """Threads that take tasks in order and never hold the process back from its end.

    Args:
        count: how many.
        name: of the threads.
    """

    def __init__(self, count: int, *, name: str) -> None:
        self._tasks: queue.SimpleQueue = queue.SimpleQueue()
        self._count = count
        for number in range(count):
            threading.Thread(target=_work, args=(self._tasks,), name=f"{name}-{number}", daemon=True).start()

    def submit(self, task: Callable[[], T]) -> Future[T]:
        """Return the future of a task; one that is cancelled before its turn is never begun."""
        future: Future[T] = Future()
        self._tasks.put((future, task))
        return future

    def close(self) -> None:
        """End the threads once all tasks before this are done or cancelled."""
        for _ in range(self._count):
            self._tasks.put(None)


def _work(tasks: queue.SimpleQueue) -> None:
    while (item := tasks.get()) is not None:
        future, task = item
        if future.set_running_or_notify_cancel():
            try:
                result = task()
            except BaseException as error:  # it belongs to whoever asks for the result
                future.set_exception(error)
            else:
                future.set_result(result)
                del result
        del item, future, task  # what a task returned is held by who asked for it, and by nobody else


def made_ahead(tasks: Iterable[Callable[[], T]], *, workers: int) -> Iterator[T]:
    """Yield the tasks' results in order.

    Args:
        tasks: each makes one result.
        workers: threads that make results ahead, two for each thread; 0 makes each when it is asked for.
    """
    if workers == 0:
        for task in tasks:
            yield task()
        return
    threads, pending = Threads(workers, name="loader"), deque()
    try:
        for task in tasks:
            pending.append(threads.submit(task))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()
        threads.close()
