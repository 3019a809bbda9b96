"""The connection to a Dask scheduler, on an event loop of its own.

Dask is imported when the connection is made.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from concurrent.futures import CancelledError
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from pgflow_worker.tracebacks import reason

if TYPE_CHECKING:
    import distributed

CONNECT_SECONDS = 5.0
AGAIN_SECONDS = 5.0  # between two attempts to connect
CLOSE_SECONDS = 2.0
LOOK_SECONDS = 0.25  # between two looks whether a connection still is one
PING_SECONDS = 2.0
ANSWER_SECONDS = 10.0  # how long a scheduler may take to answer
PLACE_SECONDS = 20.0  # how long a task may wait for a place: pgflow counts it as running
REST_SECONDS = 15  # what cannot run now is left alone for so long
# Between two messages to the scheduler. Dask's 10 ms would be most of what a short task takes.
SEND_SECONDS = 0.001
MAX_EXAMINED = 50  # workers
BUSY_SECONDS = 3.0  # what does not answer within so many is busy
INSTALL = (
    "install Debian's python3-distributed, or the package distributed into the virtual environment "
    "of pgflow_worker.set_environment()"
)


class NotRun(Exception):
    """A task was not run, and nothing of it has happened."""


class NoPlace(NotRun):
    """There was no worker for a task, and others of its step would not find one either."""


class Lost(Exception):
    """The connection was lost while a task was on the cluster: nobody knows what became of it."""


class TooLong(Exception):
    """A task has begun, and did not end in time."""


class Evaluation(NamedTuple):
    """A Python expression and its variables, to be evaluated on a worker.

    key: of the task. resources: what it needs. seconds: for how long it may run from when it tells
    that it has begun. once: whether remote.py takes care that it is not begun twice. worker: the
    address of that which should do it.
    """

    key: str
    expression: str
    variables: Mapping[str, object]
    resources: Mapping[str, float]
    seconds: float
    once: bool
    worker: str | None = None


class Cluster:
    """A Dask scheduler and its workers. Everything but the properties is for the event loop.

    address: such as tcp://10.0.0.7:8786. topic: of the events in which tasks tell that they begin.
    is_connecting: whether the first attempt to connect has not ended. trouble: why nothing can be
    run now, if so.
    """

    def __init__(self, address: str, topic: str) -> None:
        self.address = address
        self.is_connecting = True
        self.trouble: str | None = None
        self._topic = topic
        self._connection: _Connection | None = None

    async def keep(self) -> None:
        """Connect, and connect again after a while when that fails or the connection is lost."""
        while True:
            try:
                self._connection = await self._connect()
                self.trouble = await self._connection.trouble()
                self.is_connecting = False
                while True:
                    await self._connection.watch()
                    self.trouble = await self._connection.trouble()
                    if self.trouble is not None:
                        # Nobody runs what is there, and it is not to wait for its time to be up.
                        self._connection.lose(self.trouble)
            except Exception as error:
                was_there = self._connection is not None
                self.trouble = self._no_connection(error, was_there=was_there)
            await self.close()
            self.is_connecting = False
            await asyncio.sleep(AGAIN_SECONDS)

    async def close(self) -> None:
        """Leave the cluster, which then drops what this connection has asked for."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()

    async def evaluate(self, wanted: Evaluation) -> object:
        """The value of the expression. Raises NotRun, Lost and TooLong, and what Dask raises."""
        connection = self._connection
        if connection is None:
            raise NoPlace(self.trouble or f"Dask scheduler {self.address} is not connected")
        return await connection.evaluate(wanted)

    async def examine(
        self, expression: str, variables: Mapping[str, object]
    ) -> str | dict[str, tuple[str | None, dict[str, float]] | None]:
        """What the expression gives on every worker, by address: a problem, and resources.

        A text if there is no connection, or no worker. None for a worker that is busy.
        """
        try:
            connection = await self._connect()
        except Exception as error:
            return self._no_connection(error)
        try:
            return await connection.trouble() or await connection.examine(expression, variables)
        except Exception as error:
            return self._no_connection(error, was_there=True)
        finally:
            await connection.close()

    def _no_connection(self, error: Exception, *, was_there: bool = False) -> str:
        if isinstance(error, ImportError):
            return f"Dask cannot be used ({reason(error)}): {INSTALL}"
        verb = "was lost" if was_there else "cannot be made"
        text = f"the connection to Dask scheduler {self.address} {verb}: {reason(error)}"
        if error.__cause__ is not None:
            text += f" ({reason(error.__cause__)})"
        if isinstance(error, OSError | TimeoutError):
            return text
        if "ssl_context" in text:
            return f"{text}: TLS needs Dask's settings distributed.comm.tls, in /etc/dask"
        from distributed import __version__

        return f"{text} (perhaps its version of Dask is another than {__version__}, which is here)"

    async def _connect(self) -> _Connection:
        import dask
        import distributed

        # What matters is told by our errors and notes; the server's log is for the server.
        for name in [n for n in logging.root.manager.loggerDict if n.startswith("distributed")]:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        with dask.config.set({"distributed.comm.timeouts.connect": CONNECT_SECONDS}):
            client = distributed.Client(
                self.address,
                timeout=CONNECT_SECONDS,
                asynchronous=True,
                set_as_default=False,
                name="pgflow_worker",
            )
            try:
                async with asyncio.timeout(CONNECT_SECONDS + 1):
                    await client
                difference = await _difference(client)
            except BaseException:
                with suppress(Exception):
                    async with asyncio.timeout(CLOSE_SECONDS):
                        await client.close()
                raise
        return _Connection(self.address, client, self._topic, difference)


class _Connection:
    """As long as it lasts. difference: of the versions of Dask, for those who read of trouble."""

    def __init__(
        self, address: str, client: distributed.Client, topic: str, difference: str
    ) -> None:
        self._address = address
        self._client = client
        self._difference = difference
        self._lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._begun: dict[str, asyncio.Future[None]] = {}
        client.subscribe_topic(topic, self._note_begun)
        with suppress(AttributeError):  # only faster
            client.scheduler_comm.interval = SEND_SECONDS

    async def trouble(self) -> str | None:
        """Why nothing can be run, if so. Raises OSError if the scheduler does not answer."""
        if await self._workers():
            return None
        return f"Dask scheduler {self._address} has no workers{self._difference}"

    async def watch(self) -> None:
        """Wait until the next ping. Raises OSError if the connection was lost meanwhile."""
        until = time.monotonic() + PING_SECONDS
        while time.monotonic() < until:
            await asyncio.sleep(LOOK_SECONDS)
            if not self._is_there:
                raise OSError("it was closed")

    def lose(self, why: str) -> None:
        """Let everything that is on the cluster now be lost."""
        lost, self._lost = self._lost, asyncio.get_running_loop().create_future()
        lost.set_result(why)

    async def close(self) -> None:
        """Leave the cluster."""
        self.lose(self._was_lost)
        with suppress(Exception):
            async with asyncio.timeout(CLOSE_SECONDS):
                await self._client.close()

    async def evaluate(self, wanted: Evaluation) -> object:
        """See Cluster.evaluate()."""
        begun = self._begun[wanted.key] = asyncio.get_running_loop().create_future()
        lost = self._lost
        future = self._client.submit(
            *(eval, wanted.expression, dict(wanted.variables)),
            key=wanted.key,
            pure=False,
            resources=dict(wanted.resources),
            workers=None if wanted.worker is None else [wanted.worker],
            allow_other_workers=wanted.worker is not None,
        )
        answer = asyncio.ensure_future(_result_of(future))
        answer.add_done_callback(lambda done: done.cancelled() or done.exception())
        try:
            await _first(answer, begun, lost, seconds=PLACE_SECONDS)
            if begun.done():
                await _first(answer, lost, seconds=wanted.seconds)
            if answer.done():
                return answer.result()
            if lost.done():
                raise Lost(lost.result())
            if begun.done():
                raise TooLong
            raise NoPlace(self._no_place(wanted.resources))
        except CancelledError:
            if self._is_there and not lost.done():
                raise
            raise Lost(self._was_lost) from None
        finally:
            del self._begun[wanted.key]
            answer.cancel()
            # Whatever of it is still to run is not wanted any more.
            future.release()
            if wanted.once:
                self._forget_begun(wanted.key)

    async def examine(
        self, expression: str, variables: Mapping[str, object]
    ) -> dict[str, tuple[str | None, dict[str, float]] | None]:
        """See Cluster.examine(). None for a worker that is busy."""
        found: dict[str, tuple[str | None, dict[str, float]] | None] = {}

        async def examine_one(worker: str) -> None:
            future = self._client.submit(
                eval, expression, dict(variables), pure=False, workers=[worker]
            )
            try:
                async with asyncio.timeout(BUSY_SECONDS):
                    found[worker] = await future
            except TimeoutError:
                found[worker] = None
            except (Exception, CancelledError, asyncio.CancelledError) as error:
                found[worker] = reason(error) + self._difference, {}
            finally:
                future.release()

        await asyncio.gather(*map(examine_one, (await self._workers())[:MAX_EXAMINED]))
        return found

    def _forget_begun(self, key: str) -> None:
        """Remove what remote.py has noted of a task that must not run twice."""
        from distributed import Variable

        with suppress(Exception):
            Variable(f"pgflow_worker/{key}", client=self._client).delete()

    async def _workers(self) -> list[str]:
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                return list(await self._client.nthreads())
        except TimeoutError:
            raise OSError(f"no answer within {ANSWER_SECONDS:g} s") from None

    @property
    def _was_lost(self) -> str:
        return f"the connection to Dask scheduler {self._address} was lost{self._difference}"

    @property
    def _is_there(self) -> bool:
        return str(self._client.status) == "running"

    def _note_begun(self, event: tuple[float, str]) -> None:
        begun = self._begun.get(event[1])
        if begun is not None and not begun.done():
            begun.set_result(None)

    def _no_place(self, resources: Mapping[str, float]) -> str:
        wanted = f" with resources {dict(resources)}" if resources else ""
        return (
            f"no worker{wanted} of Dask scheduler {self._address} had a free place within "
            f"{PLACE_SECONDS:g} s"
        )


async def _difference(client: distributed.Client) -> str:
    """What to say if scheduler and server have other versions of Dask."""
    from distributed import __version__

    async with asyncio.timeout(CONNECT_SECONDS):
        known = await client.scheduler.versions()
    there = known["packages"]["distributed"]
    if there == __version__:
        return ""
    return f" (Dask is {__version__} in the server and {there} on the scheduler)"


async def _result_of(future: distributed.Future) -> object:
    try:
        result: object = await future
    except asyncio.CancelledError:  # some versions of Dask raise this one
        raise CancelledError from None
    return result


async def _first(*futures: asyncio.Future[Any], seconds: float) -> None:
    await asyncio.wait(futures, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
