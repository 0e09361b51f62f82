"""Threads that run Python: the standard library's, with an error that says what to do when there are none."""

from __future__ import annotations

import errno
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from estargz.errors import from_status

__all__ = ["Threads"]

T = TypeVar("T")
NO_THREAD = -53  # ext/estargz/status.h


class Threads(ThreadPoolExecutor):
    """A pool of threads. ``submit`` raises EstargzError when a thread is needed and cannot be started."""

    def submit(self, work: Callable[..., T], /, *arguments: Any, **named: Any) -> Future[T]:
        try:
            return super().submit(work, *arguments, **named)
        except RuntimeError as error:
            if "start new thread" not in str(error):
                raise
            raise from_status(NO_THREAD, errno.EAGAIN) from error
