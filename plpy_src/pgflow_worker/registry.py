"""Every statement on this extension's own tables: modules, slots, attempts, invocations."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from pgflow_worker.database import Database, Statement
from pgflow_worker.pgflow import Claim

DEFAULT_MAX_DEATHS = 3
DEFAULT_MAX_CRASHES = 2

_SOURCES = Statement("select module, source from pgflow_worker.modules where current")
_REVISION = Statement("select pgflow_worker._revision() as revision")
_SETTINGS = Statement("select name, value from pgflow_worker.settings")
_FLOWS = Statement("select flow_slug, module from pgflow_worker.flows")
_LOCK_MODULES = Statement("lock table pgflow_worker.modules in share row exclusive mode")
_RETIRE = Statement(
    "update pgflow_worker.modules set current = false where module = $1 and current", ("text",)
)
_STORE = Statement(
    """insert into pgflow_worker.modules (module, version, source)
    select $1, 1 + coalesce(pg_catalog.max(version), 0), $2
    from pgflow_worker.modules where module = $1""",
    ("text", "text"),
)
_SET_FLOW = Statement(
    """insert into pgflow_worker.flows (flow_slug, module, version)
    select $1, module, version from pgflow_worker.modules where module = $2 and current
    on conflict (flow_slug) do update set module = excluded.module, version = excluded.version""",
    ("text", "text"),
)
_REMOVE_FLOW = Statement("delete from pgflow_worker.flows where flow_slug = $1", ("text",))
_EXECUTORS = Statement(
    "select flow_slug, step_slug, address, send_secrets from pgflow_worker.executors"
)
_SET_EXECUTOR = Statement(
    """insert into pgflow_worker.executors (flow_slug, step_slug, address, send_secrets)
    values ($1, $2, $3, $4) on conflict (flow_slug, step_slug)
    do update set address = excluded.address, send_secrets = excluded.send_secrets""",
    ("text", "text", "text", "boolean"),
)
_REMOVE_EXECUTORS = Statement("delete from pgflow_worker.executors where flow_slug = $1", ("text",))
_SET_SETTING = Statement(
    """insert into pgflow_worker.settings (name, value) values ($1, $2)
    on conflict (name) do update set value = excluded.value""",
    ("text", "text"),
)
_UNSET_SETTING = Statement("delete from pgflow_worker.settings where name = $1", ("text",))
_SLOTS = Statement(
    "select slot, enabled, worker_id::text, lock_key, pid from pgflow_worker._slots($1)", ("text",)
)
_TRY_LOCK = Statement("select pg_catalog.pg_try_advisory_lock($1) as locked", ("bigint",))
_UNLOCK = Statement("select pg_catalog.pg_advisory_unlock($1)", ("bigint",))
_LEFT_BEHIND = Statement(
    "select lost, locks, temporary from pgflow_worker._left_behind($1)", ("bigint[]",)
)
_RELEASE_LOCKS = Statement("select pgflow_worker._release_locks($1)", ("bigint[]",))
_STATE = Statement(
    """select pgflow_worker._pause_reason($1) as pause_reason,
        pgflow_worker._revision() as revision""",
    ("text",),
)
_RECORD_ATTEMPT = Statement(
    """insert into pgflow_worker.attempts (flow_slug, run_id, step_slug, task_index, worker_id,
        attempt, outcome, duration_ms, error, traceback, log)
    values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)""",
    (
        *("text", "uuid", "text", "integer", "uuid"),
        *("integer", "text", "double precision", "text", "text", "text"),
    ),
)
_COUNT_ATTEMPTS = Statement(
    """select pg_catalog.count(*) as attempts from pgflow_worker.attempts
    where run_id = $1 and step_slug = $2 and task_index = $3 and outcome = $4
        and outcome in ('died', 'suspected', 'crashed')""",
    ("uuid", "text", "integer", "text"),
)
_SET_LIVING = Statement(
    "insert into pgflow_worker.living (worker_id) values ($1) on conflict do nothing", ("uuid",)
)
_IS_LIVING = Statement(
    "select exists (select from pgflow_worker.living where worker_id = $1) as living", ("uuid",)
)
_PAUSE = Statement("select pgflow_worker.pause($1, $2)", ("text", "text"))
_SUSPECTS_KEY = Statement(
    "select pg_catalog.hashtextextended('pgflow_worker/suspects', 0) as lock_key"
)
_FORGET_ATTEMPTS = Statement("delete from pgflow_worker.attempts where flow_slug = $1", ("text",))
_NEXT_FLOW = Statement(
    "select flow_slug, status, notes from pgflow_worker._next_flow($1)", ("text[]",)
)
_CHECK = Statement(
    "select pgflow_worker._check_pgflow(), pgflow_worker._check_queue($1)", ("text",)
)
_LOAD = Statement("select pgflow_worker._raise(pgflow_worker._load())")
_LOAD_SECRETS = Statement("select pgflow_worker._raise(pgflow_worker._load_secrets())")
_RECORD_INVOCATION = Statement(
    "insert into pgflow_worker.invocations (flow_slug, report) values ($1, $2::jsonb)",
    ("text", "text"),
)


@dataclass(frozen=True)
class Slot:
    """A place that one worker of a flow can occupy; `pid` is its holder's."""

    slot: int
    enabled: bool
    worker_id: str
    lock_key: int
    pid: int | None


@dataclass(frozen=True)
class Placement:
    """The Dask scheduler of a step's handlers, and whether they may have the flow's secrets."""

    address: str
    send_secrets: bool


@dataclass(frozen=True)
class LeftBehind:
    """Whether the worker has lost a lock; the number of other advisory locks; temporary tables."""

    lost: bool
    locks: int
    temporary: bool


@dataclass(frozen=True)
class NextFlow:
    """The flow that has something to do; without one, what the report is to say."""

    flow_slug: str | None
    status: str
    notes: list[str]


@dataclass(frozen=True)
class State:
    """Why the flow is paused, None if it is not; and the deployed modules' revision()."""

    pause_reason: str | None
    revision: str


class Registry:
    """This extension's tables. Transactions are the caller's."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._lock_keys: list[int] = []
        self._suspects_key: int | None = None

    def load(self) -> None:
        """Let the server module take note of what is deployed now."""
        self._database.execute(_LOAD)

    def load_secrets(self) -> None:
        """Let the server module read, as the extension's owner, the secrets that it waits for."""
        self._database.execute(_LOAD_SECRETS)

    def sources(self) -> dict[str, str]:
        """The text of every deployed module, by name."""
        return {row["module"]: row["source"] for row in self._database.execute(_SOURCES)}

    def revision(self) -> str:
        """Names the deployed modules' versions; it changes with every deploy of new text."""
        revision: str = self._database.execute(_REVISION)[0]["revision"]
        return revision

    def settings(self) -> dict[str, str]:
        """The settings that differ from their defaults."""
        return {row["name"]: row["value"] for row in self._database.execute(_SETTINGS)}

    def set_setting(self, name: str, value: str | None) -> None:
        """Set a setting; None takes its default."""
        if value is None:
            self._database.execute(_UNSET_SETTING, name)
        else:
            self._database.execute(_SET_SETTING, name, value)

    def placements(self) -> dict[str, dict[str | None, Placement | None]]:
        """By flow and step, None for all that are not named. The value None: in the server."""
        found: dict[str, dict[str | None, Placement | None]] = {}
        for row in self._database.execute(_EXECUTORS):
            steps = found.setdefault(row["flow_slug"], {})
            address = row["address"]
            placement = None if address is None else Placement(address, row["send_secrets"])
            steps[row["step_slug"]] = placement
        return found

    def set_placement(
        self, flow_slug: str, step_slug: str | None, placement: Placement | None
    ) -> None:
        """Send a flow's or a step's handlers to a cluster, or with None leave them to the server:

        a step's, or all of the flow's.
        """
        if placement is not None:
            row = placement.address, placement.send_secrets
            self._database.execute(_SET_EXECUTOR, flow_slug, step_slug, *row)
        elif step_slug is not None:
            self._database.execute(_SET_EXECUTOR, flow_slug, step_slug, None, False)
        else:
            self._database.execute(_REMOVE_EXECUTORS, flow_slug)

    def flows(self) -> dict[str, str]:
        """Every deployed flow's module, by the flow's slug."""
        return {row["flow_slug"]: row["module"] for row in self._database.execute(_FLOWS)}

    def lock(self) -> None:
        """Let nobody else deploy until the transaction ends."""
        self._database.execute(_LOCK_MODULES)

    def store(self, module: str, source: str) -> None:
        """Make this text the module's current version."""
        self._database.execute(_RETIRE, module)
        self._database.execute(_STORE, module, source)

    def set_flow(self, flow_slug: str, module: str) -> None:
        """Note that the module's current version defines the flow."""
        self._database.execute(_SET_FLOW, flow_slug, module)

    def remove_flow(self, flow_slug: str) -> None:
        """Forget a flow; its runs stay."""
        self._database.execute(_REMOVE_FLOW, flow_slug)

    def next_flow(self, besides: Collection[str]) -> NextFlow:
        """Of all flows but some, the one whose ready task is oldest."""
        return NextFlow(**self._database.execute(_NEXT_FLOW, list(besides))[0])

    def check(self, flow_slug: str) -> None:
        """Raise DatabaseError if pgflow, pgmq or the flow's queue is missing."""
        self._database.execute(_CHECK, flow_slug)

    def slots(self, flow_slug: str) -> list[Slot]:
        """All slots of a flow, those that are not enabled included."""
        return [Slot(**row) for row in self._database.execute(_SLOTS, flow_slug)]

    def try_lock(self, lock_key: int) -> bool:
        """Take a slot's lock for this session. To be asked only for a slot that nobody holds:

        PostgreSQL grants a session its own lock again.
        """
        locked: bool = self._database.execute(_TRY_LOCK, lock_key)[0]["locked"]
        if locked:
            self._lock_keys.append(lock_key)
        return locked

    def unlock(self, lock_key: int) -> None:
        """Release a lock."""
        self._database.execute(_UNLOCK, lock_key)
        self._lock_keys.remove(lock_key)

    def unlock_all(self) -> None:
        """Release every lock that was taken."""
        while self._lock_keys:
            self.unlock(self._lock_keys[-1])

    def try_lock_suspects(self) -> bool:
        """Be the one session that runs a task which may have crashed the server."""
        if self._suspects_key is None:
            self._suspects_key = self._database.execute(_SUSPECTS_KEY)[0]["lock_key"]
        return self._suspects_key in self._lock_keys or self.try_lock(self._suspects_key)

    def unlock_suspects(self) -> None:
        """Let another session be it."""
        if self._suspects_key in self._lock_keys:
            self.unlock(self._suspects_key)

    def left_behind(self) -> LeftBehind:
        """What the SQL of handlers has changed in the session."""
        return LeftBehind(**self._database.execute(_LEFT_BEHIND, self._lock_keys)[0])

    def release_foreign_locks(self) -> None:
        """Release the session's advisory locks that were not taken here."""
        self._database.execute(_RELEASE_LOCKS, self._lock_keys)

    def state(self, flow_slug: str) -> State:
        """What may have changed while a call is working."""
        return State(**self._database.execute(_STATE, flow_slug)[0])

    def record_attempt(
        self,
        flow_slug: str,
        claim: Claim,
        outcome: str,
        *,
        duration_ms: float | None = None,
        error: str | None = None,
        traceback: str | None = None,
        log: str | None = None,
    ) -> None:
        """Keep how an attempt ended, if it was not completed."""
        self._database.execute(
            _RECORD_ATTEMPT,
            *(flow_slug, *claim.key, claim.worker_id, claim.attempt),
            *(outcome, duration_ms, error, traceback or None, log or None),
        )

    def count_attempts(self, claim: Claim, outcome: str) -> int:
        """How many of the task's attempts have ended as died, suspected or crashed."""
        rows = self._database.execute(_COUNT_ATTEMPTS, *claim.key, outcome)
        attempts: int = rows[0]["attempts"]
        return attempts

    def set_living(self, worker_id: str) -> None:
        """Note that the worker starts tasks; the note ends with a crash of the server."""
        self._database.execute(_SET_LIVING, worker_id)

    def is_living(self, worker_id: str) -> bool:
        """Whether the server has not crashed since the worker started its last task."""
        living: bool = self._database.execute(_IS_LIVING, worker_id)[0]["living"]
        return living

    def pause(self, flow_slug: str, reason: str) -> None:
        """Pause a flow."""
        self._database.execute(_PAUSE, flow_slug, reason)

    def forget_attempts(self, flow_slug: str) -> None:
        """Delete the attempts of a flow whose runs are deleted."""
        self._database.execute(_FORGET_ATTEMPTS, flow_slug)

    def record_invocation(self, flow_slug: str, report: str) -> None:
        """Keep a call's report (JSON text)."""
        self._database.execute(_RECORD_INVOCATION, flow_slug, report)
