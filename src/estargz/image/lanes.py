"""Layers side by side: as many at once as there are lanes, the smallest first, so that none waits for a larger one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Generic, TypeVar

from estargz.errors import EstargzError

__all__ = ["AbandonedError", "Job", "run"]

T = TypeVar("T")


class AbandonedError(EstargzError):
    """Work that was given up because other work had failed."""


@dataclass(frozen=True)
class Job(Generic[T]):
    """``work`` is given a check to call now and then, which raises AbandonedError when the work has become pointless.

    ``size`` decides the order: bytes, or infinity where nobody knows.
    """

    size: float
    work: Callable[[Callable[[], None]], T]


def run(jobs: Sequence[Job[T]], lanes: int) -> list[T]:
    """What the jobs return, in their order.

    When one fails, or the caller is interrupted, those that have not begun never do, and the others are waited for. Of
    several failures the one is raised whose job comes first.
    """
    stop = threading.Event()

    def check() -> None:
        if stop.is_set():
            raise AbandonedError("given up because another layer failed")

    with ThreadPoolExecutor(max(lanes, 1), thread_name_prefix="estargz-lane") as executor:
        futures: dict[int, Future[T]] = {}
        try:
            for number in sorted(range(len(jobs)), key=lambda number: jobs[number].size):
                futures[number] = executor.submit(jobs[number].work, check)
            wait(futures.values(), return_when=FIRST_EXCEPTION)
            if any(failed(future) for future in futures.values()):
                raise AbandonedError
        except BaseException as error:
            stop.set()
            for future in futures.values():
                future.cancel()
            wait(futures.values())
            if isinstance(error, AbandonedError):
                raise first_failure([futures[number] for number in range(len(jobs))]) from None
            raise
    return [futures[number].result() for number in range(len(jobs))]


def failed(future: Future[T]) -> bool:
    return future.done() and not future.cancelled() and future.exception() is not None


def first_failure(futures: Sequence[Future[T]]) -> BaseException:
    """The failure that others did not cause."""
    errors = [future.exception() for future in futures if failed(future)]
    own = [error for error in errors if error is not None and not isinstance(error, AbandonedError)]
    return own[0] if own else AbandonedError("given up")
