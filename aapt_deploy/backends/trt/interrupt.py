"""Let Ctrl-C end work that a library does in one call."""

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import TypeVar

T = TypeVar("T")


def interruptible(work: Callable[[], T], cancelled: threading.Event) -> T:
    """Do `work` in a thread, and set `cancelled` at Ctrl-C or SIGTERM.

    Python's main thread alone is told of signals. Inside the library, that would be after the work,
    or in a callback such as a log's, and TensorRT drops what a callback raises. Waits for the
    thread, and raises what it raised.
    """
    answers: list[T] = []
    # Not an Event: a signal handler that raises inside leaves its lock taken. Not Thread.join:
    # interrupted, it takes a running thread for a stopped one (Python 3.11).
    finished = SimpleQueue[BaseException | None]()

    def run() -> None:
        error: BaseException | None = None
        try:
            answers.append(work())
        except BaseException as raised:
            error = raised
        for _ in range(2):  # a signal may come as the first is taken, and it is lost then
            finished.put(error)

    started = False
    try:
        threading.Thread(target=run, name="TensorRT build").start()
        started = True
        error = finished.get()
    except BaseException:
        cancelled.set()
        if started:
            finished.get()
        raise
    if error is not None:
        raise error
    return answers[0]
