"""Every statement on this extension's own tables: modules, slots, attempts, invocations."""

from __future__ import annotations

from dataclasses import dataclass

from pgflow_worker.database import Database, Statement
from pgflow_worker.pgflow import Claim

DEFAULT_MAX_DEATHS = 3

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
_HOLDS_SLOT = Statement("select pgflow_worker._holds_slot($1) as holds", ("bigint",))
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
_DEATHS = Statement(
    """select pg_catalog.count(*) as deaths from pgflow_worker.attempts
    where run_id = $1 and step_slug = $2 and task_index = $3 and outcome = 'died'""",
    ("uuid", "text", "integer"),
)
_FORGET_ATTEMPTS = Statement("delete from pgflow_worker.attempts where flow_slug = $1", ("text",))
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
class State:
    """Why the flow is paused, None if it is not; and the deployed modules' revision()."""

    pause_reason: str | None
    revision: str


class Registry:
    """This extension's tables. Transactions are the caller's."""

    def __init__(self, database: Database) -> None:
        self._database = database

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

    def slots(self, flow_slug: str) -> list[Slot]:
        """All slots of a flow, those that are not enabled included."""
        return [Slot(**row) for row in self._database.execute(_SLOTS, flow_slug)]

    def try_lock(self, slot: Slot) -> bool:
        """Occupy a slot for this session. To be asked only for a slot that nobody holds:

        PostgreSQL grants a session its own lock again.
        """
        locked: bool = self._database.execute(_TRY_LOCK, slot.lock_key)[0]["locked"]
        return locked

    def unlock(self, slot: Slot) -> None:
        """Leave a slot."""
        self._database.execute(_UNLOCK, slot.lock_key)

    def holds(self, slot: Slot) -> bool:
        """Whether this session still has the slot: a handler's SQL can release any lock.

        Under any search_path, and so outside a transaction of ours too.
        """
        holds: bool = self._database.execute(_HOLDS_SLOT, slot.lock_key)[0]["holds"]
        return holds

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
        """Keep how an attempt ended: failed, died, suspected or discarded."""
        self._database.execute(
            _RECORD_ATTEMPT,
            *(flow_slug, *claim.key, claim.worker_id, claim.attempt),
            *(outcome, duration_ms, error, traceback or None, log or None),
        )

    def deaths(self, claim: Claim) -> int:
        """How many workers have died running the task and no other."""
        deaths: int = self._database.execute(_DEATHS, *claim.key)[0]["deaths"]
        return deaths

    def forget_attempts(self, flow_slug: str) -> None:
        """Delete the attempts of a flow whose runs are deleted."""
        self._database.execute(_FORGET_ATTEMPTS, flow_slug)

    def record_invocation(self, flow_slug: str, report: str) -> None:
        """Keep a call's report (JSON text)."""
        self._database.execute(_RECORD_INVOCATION, flow_slug, report)
