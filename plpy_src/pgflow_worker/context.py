"""What a handler is told about its task."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING
from uuid import UUID

if TYPE_CHECKING:
    from logging import Logger


class Context:
    """The task a handler runs for. Asked for by annotation: `ctx: Context`.

    run_id: the run. flow_slug, step_slug: text. task_index: position of a map's element,
    else 0. attempt: 1 for the first. max_attempts: how many there may be. timeout: seconds.
    clock: seconds, as the timeout counts them.
    """

    def __init__(
        self,
        *,
        run_id: UUID | str,
        flow_slug: str,
        step_slug: str,
        task_index: int = 0,
        attempt: int = 1,
        max_attempts: int = 1,
        timeout: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run_id = run_id
        self.flow_slug = flow_slug
        self.step_slug = step_slug
        self.task_index = task_index
        self.attempt = attempt
        self.max_attempts = max_attempts
        self.timeout = timeout
        self._clock = clock
        self._started = clock()

    @cached_property
    def run_id(self) -> UUID:
        """The run."""
        return UUID(str(self._run_id))

    @property
    def idempotency_key(self) -> str:
        """The same text in every attempt of this task: `run_id/step_slug/task_index`."""
        return f"{self._run_id}/{self.step_slug}/{self.task_index}"

    def remaining(self) -> float:
        """Seconds until the step's timeout; negative after it.

        For an async or thread handler the time in which it stood still does not count: Python
        cannot go on in other threads while the worker's main thread is in SQL.
        """
        return self.timeout - (self._clock() - self._started)

    @cached_property
    def log(self) -> Logger:
        """A logger whose lines are stored with the attempt, the last 10,000 characters of them."""
        # Imported by the first handler that logs: logging costs a fresh interpreter 10 ms or more.
        from pgflow_worker.log import attempt_logger

        return attempt_logger(f"{self.flow_slug}.{self.step_slug}")

    @property
    def log_text(self) -> str:
        """What has been logged so far."""
        if "log" not in self.__dict__:
            return ""
        from pgflow_worker.log import text_of

        return text_of(self.log)
