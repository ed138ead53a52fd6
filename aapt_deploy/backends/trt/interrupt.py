"""Let Ctrl-C end work that a library does in one call."""

import threading
from collections.abc import Callable
from typing import TypeVar

POLL_S = 0.2  # how often Ctrl-C is looked for

T = TypeVar("T")


def interruptible(work: Callable[[], T], cancelled: threading.Event) -> T:
    """Do `work` in a thread, and set `cancelled` at Ctrl-C or SIGTERM.

    Python's main thread alone is told of signals. Inside the library, that would be after the work,
    or in a callback such as a log's, and TensorRT drops what a callback raises. Waits for the
    thread, and raises what it raised.
    """
    answers: list[T] = []
    errors: list[BaseException] = []
    # Not Thread.join: interrupted, it takes a running thread for a stopped one (Python 3.11).
    finished = threading.Event()

    def run() -> None:
        try:
            answers.append(work())
        except BaseException as error:
            errors.append(error)
        finally:
            finished.set()

    try:
        threading.Thread(target=run, name="TensorRT build").start()
        while not finished.wait(POLL_S):
            pass
    except BaseException:
        cancelled.set()
        finished.wait()
        raise
    if errors:
        raise errors[0]
    return answers[0]
