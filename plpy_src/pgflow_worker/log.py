"""The log of one attempt, kept in memory until the attempt is stored."""

from __future__ import annotations

import logging
from collections import deque

from pgflow_worker.tracebacks import printable, reason

MAX_CHARACTERS = 10_000


def attempt_logger(name: str) -> logging.Logger:
    """A logger of its own, outside the hierarchy that the process may have configured."""
    logger = logging.Logger(name)
    logger.addHandler(_Lines())
    return logger


def text_of(logger: logging.Logger) -> str:
    """What an attempt's logger has kept."""
    return "\n".join(handler.text() for handler in logger.handlers if isinstance(handler, _Lines))


class _Lines(logging.Handler):
    """Keeps the last lines, because what precedes an error explains it best."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self._lines: deque[str] = deque()
        self._length = 0
        self._dropped = 0

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
        except Exception as error:  # the arguments do not fit the text: not worth the task
            text = record.msg if isinstance(record.msg, str) else type(record.msg).__name__
            line = f"{record.levelname} {text} ({reason(error)})"
        # Made printable before it is cut, so that no part of a secret is left.
        line = printable(line)[:MAX_CHARACTERS]
        self._lines.append(line)
        self._length += len(line) + 1
        while self._length > MAX_CHARACTERS and len(self._lines) > 1:
            self._length -= len(self._lines.popleft()) + 1
            self._dropped += 1

    def text(self) -> str:
        dropped = [f"... {self._dropped} earlier lines ..."] if self._dropped else []
        return "\n".join([*dropped, *self._lines])
