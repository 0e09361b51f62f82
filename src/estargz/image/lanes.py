"""Layers side by side: as many at once as there are lanes, the smallest first, so that none waits for a larger one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import dataclass
from typing import Generic, TypeVar

from estargz.errors import EstargzError
from estargz.threads import Threads

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


def run(jobs: Sequence[Job[T]], lanes: int, *, abandon: Callable[[], object]) -> list[T]:
    """What the jobs return, in their order.

    When one fails, or the caller is interrupted, those that have not begun never do, ``abandon`` is called, which is to wake
    those that wait for something far away, and all are waited for. Of several failures the one is raised whose job comes
    first; what fails afterwards does so because it was abandoned.
    """
    stop = threading.Event()

    def check() -> None:
        if stop.is_set():
            raise AbandonedError("given up because another layer failed")

    with Threads(max(lanes, 1), thread_name_prefix="estargz-lane") as executor:
        futures: dict[int, Future[T]] = {}
        try:
            for number in sorted(range(len(jobs)), key=lambda number: jobs[number].size):
                futures[number] = executor.submit(jobs[number].work, check)
            wait(futures.values(), return_when=FIRST_EXCEPTION)
            for number in range(len(jobs)):
                if (error := failure(futures[number])) is not None:
                    raise error
        except BaseException:
            stop.set()
            for future in futures.values():
                future.cancel()
            abandon()
            wait(futures.values())
            raise
    return [futures[number].result() for number in range(len(jobs))]


def failure(future: Future[T]) -> BaseException | None:
    """Why a job has failed, if it has already."""
    return future.exception() if future.done() and not future.cancelled() else None
