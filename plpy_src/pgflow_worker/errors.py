"""Errors with a SQLSTATE, a message that names the cause and a hint that names the cure."""

from __future__ import annotations

from typing import ClassVar


class WorkerError(Exception):
    """An error of this package; the server reports it with its SQLSTATE, detail and hint.

    The texts follow PostgreSQL's style: the message in lower case without a full stop,
    detail and hint as sentences.
    """

    sqlstate: ClassVar[str] = "PW000"

    def __init__(self, message: str, *, hint: str | None = None, detail: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint
        self.detail = detail


class UnknownFlow(WorkerError):
    """No deployed module has this flow."""

    sqlstate = "PW001"


class InvalidArgument(WorkerError):
    """An argument of an SQL function is out of range."""

    sqlstate = "PW002"


class FlowMismatch(WorkerError):
    """The flow in the code and the flow in the database have different steps."""

    sqlstate = "PW003"


class UnsupportedVersion(WorkerError):
    """The installed pgflow does not have what a flow uses."""

    sqlstate = "PW004"


class ModuleFailed(WorkerError):
    """A module raised an exception while it was imported."""

    sqlstate = "PW005"


class FlowError(WorkerError, ValueError):
    """A flow is defined wrongly; the message names the flow and the step."""

    sqlstate = "PW006"


class NameRefused(WorkerError):
    """A module's name or a flow's slug is taken by something else."""

    sqlstate = "PW007"


class EnvironmentRefused(WorkerError):
    """A virtual environment does not fit this server or may be changed by others."""

    sqlstate = "PW008"


class FlowBusy(WorkerError):
    """A worker is running the flow."""

    sqlstate = "PW009"


class MissingFiles(WorkerError):
    """The Python files do not belong to the installed version of the extension."""

    sqlstate = "PW010"


class InTransaction(WorkerError):
    """work() was called where it cannot commit."""

    sqlstate = "PW011"


class UnsupportedPlatform(WorkerError):
    """The server's operating system lacks what the worker needs."""

    sqlstate = "PW012"


class SecretUnavailable(WorkerError):
    """A secret that a flow declares is missing, or where it is may not be relied on."""

    sqlstate = "PW014"


# Seconds: longer than anybody waits, and what an interval and an integer can hold.
MAX_AFTER = 315_360_000


class DatabaseError(Exception):
    """An SQL statement failed. Handlers may catch it: `error.sqlstate` tells what happened.

    Attributes: sqlstate (five characters); detail, hint, and schema, where a constraint was
    violated (text or None).
    """

    def __init__(
        self,
        message: str,
        sqlstate: str,
        detail: str | None = None,
        hint: str | None = None,
        schema: str | None = None,
    ) -> None:
        super().__init__(message)
        self.sqlstate = sqlstate
        self.detail = detail
        self.hint = hint
        self.schema = schema


class QueryCanceled(BaseException):
    """PostgreSQL canceled a statement (SQLSTATE 57014).

    Not an Exception, so that a handler's `except Exception` does not keep a canceled call alive.
    """

    sqlstate: ClassVar[str] = "57014"


class Interrupted(QueryCanceled):
    """A handler was interrupted in the middle of Python.

    It is raised once a second until the handler ends; what it does meanwhile is to clean up.
    """


class TimeIsUp(Exception):
    """A handler took longer than it may. Raised when it has ended, from what ended it."""


class Fail(Exception):
    """Raise it in a handler to fail the task for good, without the attempts that are left."""


class _Later(Exception):
    """after: seconds until the task may be tried again."""

    def __init__(self, reason: str = "", *, after: float) -> None:
        if not isinstance(after, int | float) or not 0 <= after <= MAX_AFTER:  # nan is neither
            raise ValueError(
                f"after must be a number of seconds from 0 to {MAX_AFTER:,}, not {after!r}"
            )
        super().__init__(reason or f"again after {after:g} s")
        self.after = after


class Retry(_Later):
    """Raise it in a handler to fail this attempt and choose when the next one may begin.

    Raises ValueError if `after` is not a number of seconds up to ten years.
    """


class Snooze(_Later):
    """Raise it in a handler to be called again later, without having used up an attempt.

    Raises ValueError if `after` is not a number of seconds up to ten years.
    """
