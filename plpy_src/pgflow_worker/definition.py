"""A flow's definition in the database: its rows and queue, and how they differ from the code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pgflow_worker.database import Database, Statement
from pgflow_worker.errors import FlowMismatch
from pgflow_worker.flow import Flow, Options, Step

# pgflow.create_flow()'s defaults, for what a flow leaves open.
DEFAULT_OPTIONS = Options(max_attempts=3, base_delay=5, timeout=60)

_FLOW = Statement(
    """select opt_max_attempts as max_attempts, opt_base_delay as base_delay,
        opt_timeout as timeout
    from pgflow.flows where flow_slug = $1""",
    ("text",),
)
_SAME_QUEUE = Statement(
    """select flow_slug from pgflow.flows
    where pg_catalog.lower(flow_slug) = pg_catalog.lower($1) and flow_slug <> $1""",
    ("text",),
)
_STEPS = Statement(
    """select step.step_slug, step.step_type,
        array(select dep.dep_slug from pgflow.deps as dep
              where dep.flow_slug = step.flow_slug and dep.step_slug = step.step_slug
              order by dep.dep_slug) as dependencies,
        step.opt_max_attempts as max_attempts, step.opt_base_delay as base_delay,
        step.opt_timeout as timeout, step.opt_start_delay as start_delay
    from pgflow.steps as step where step.flow_slug = $1
    order by step.step_index""",
    ("text",),
)
_CREATE_FLOW = Statement(
    "select from pgflow.create_flow($1, $2, $3, $4)", ("text", "integer", "integer", "integer")
)
_SEND_MISSING = Statement("select pgflow_worker._send_missing($1) as sent", ("text",))
_ADD_STEP = Statement(
    """select from pgflow.add_step(flow_slug => $1, step_slug => $2, deps_slugs => $3,
        max_attempts => $4, base_delay => $5, timeout => $6, start_delay => $7,
        step_type => $8)""",
    ("text", "text", "text[]", "integer", "integer", "integer", "integer", "text"),
)
_SET_FLOW_OPTIONS = Statement(
    """update pgflow.flows set opt_max_attempts = $2, opt_base_delay = $3, opt_timeout = $4
    where flow_slug = $1""",
    ("text", "integer", "integer", "integer"),
)
_SET_STEP_OPTIONS = Statement(
    """update pgflow.steps set opt_max_attempts = $3, opt_base_delay = $4, opt_timeout = $5,
        opt_start_delay = $6
    where flow_slug = $1 and step_slug = $2""",
    ("text", "text", "integer", "integer", "integer", "integer"),
)
_COUNT_RUNS = Statement(
    "select pg_catalog.count(*) as runs from pgflow.runs where flow_slug = $1", ("text",)
)
_DELETE_FLOW = (
    Statement("select from pgmq.drop_queue($1)", ("text",)),
    *(
        Statement(f"delete from pgflow.{table} where flow_slug = $1", ("text",))
        for table in ("step_tasks", "step_states", "runs", "deps", "steps", "flows")
    ),
)
_HAS_REAPER = Statement(
    """select pg_catalog.to_regprocedure('pgflow.requeue_stalled_tasks()') is not null as has"""
)


@dataclass(frozen=True)
class Difference:
    """How code and database differ. `matters`: the flow cannot be run like this."""

    text: str
    matters: bool = True


class Definition:
    """The rows and the queue that pgflow has for a flow. Transactions are the caller's."""

    def __init__(self, database: Database, flow: Flow) -> None:
        self._database = database
        self._flow = flow

    def differences(self) -> list[Difference]:
        """How the structure of the flow in the code differs from the one in the database."""
        if not self.exists():
            return [Difference(f'flow "{self._flow.slug}" is in the code, not in the database')]
        stored = {row["step_slug"]: row for row in self._database.execute(_STEPS, self._flow.slug)}
        found = []
        for slug, step in self._flow.steps.items():
            row = stored.pop(slug, None)
            if row is None:
                found.append(Difference(f'step "{slug}" is in the code, not in the database'))
                continue
            if row["step_type"] != step.type:
                found.append(
                    Difference(
                        f'step "{slug}" is a {step.type} step in the code, '
                        f"a {row['step_type']} step in the database"
                    )
                )
            if row["dependencies"] != list(step.dependencies):
                found.append(
                    Difference(
                        f'step "{slug}" depends on {_listed(step.dependencies)} in the code, '
                        f"on {_listed(row['dependencies'])} in the database"
                    )
                )
        return found + [
            Difference(f'step "{slug}" is in the database, not in the code', matters=False)
            for slug in stored
        ]

    def mismatch(self, differences: Sequence[Difference]) -> FlowMismatch:
        """The error for a flow whose code does not fit the database, with the three ways out."""
        slug = self._flow.slug
        return FlowMismatch(
            f'flow "{slug}" differs from the database',
            detail="; ".join(difference.text for difference in differences) + ".",
            hint=f'Give the changed flow a slug of its own, such as "{slug}_v2"; or, if only a '
            'function was renamed, keep the step\'s slug with @flow.step("old_name"); or deploy '
            f"with allow_data_loss => true, which deletes the flow and its runs "
            f"({self.count_runs()}).",
        )

    def exists(self) -> bool:
        """Whether pgflow knows the flow."""
        return bool(self._database.execute(_FLOW, self._flow.slug))

    def has_reaper(self) -> bool:
        """Whether pgflow itself takes back what has been started for longer than its flow's
        timeout and 30 s, whatever the timeout of the step (0.13.2 and later)."""
        has: bool = self._database.execute(_HAS_REAPER)[0]["has"]
        return has

    def same_queue(self) -> list[str]:
        """Flows whose slug differs by case only: pgmq would give them the same queue."""
        return [row["flow_slug"] for row in self._database.execute(_SAME_QUEUE, self._flow.slug)]

    def ensure_queue(self) -> None:
        """Create what is missing of the flow's row and its queue; what is there stays as it is."""
        options = with_defaults(self._flow.options)
        self._database.execute(
            _CREATE_FLOW, self._flow.slug, options.max_attempts, options.base_delay, options.timeout
        )

    def send_missing(self) -> int:
        """Send the messages that unfinished tasks have lost again; their number."""
        sent: int = self._database.execute(_SEND_MISSING, self._flow.slug)[0]["sent"]
        return sent

    def compile(self) -> None:
        """Create the flow, its queue and its steps."""
        self.ensure_queue()
        for step in self._flow.steps.values():
            self._database.execute(
                _ADD_STEP,
                self._flow.slug,
                step.slug,
                list(step.dependencies),
                step.options.max_attempts,
                step.options.base_delay,
                step.options.timeout,
                step.options.start_delay,
                step.type,
            )

    def changed_options(self) -> list[str]:
        """Which options in the database differ from the code's."""
        row = self._database.execute(_FLOW, self._flow.slug)[0]
        changes = _changes("", row, with_defaults(self._flow.options), list(row))
        for row in self._database.execute(_STEPS, self._flow.slug):
            step: Step = self._flow.steps[row["step_slug"]]
            names = ["max_attempts", "base_delay", "timeout", "start_delay"]
            changes += _changes(f"{step.slug}.", row, step.options, names)
        return changes

    def set_options(self) -> None:
        """Write the code's options, which is safe while runs are under way."""
        options = with_defaults(self._flow.options)
        self._database.execute(
            _SET_FLOW_OPTIONS,
            self._flow.slug,
            options.max_attempts,
            options.base_delay,
            options.timeout,
        )
        for step in self._flow.steps.values():
            self._database.execute(
                _SET_STEP_OPTIONS,
                self._flow.slug,
                step.slug,
                step.options.max_attempts,
                step.options.base_delay,
                step.options.timeout,
                step.options.start_delay,
            )

    def count_runs(self) -> int:
        """How many runs the flow has, finished ones included."""
        count: int = self._database.execute(_COUNT_RUNS, self._flow.slug)[0]["runs"]
        return count

    def delete(self) -> None:
        """Delete the flow, its runs with all their data, and its queue with the archive."""
        for statement in _DELETE_FLOW:
            self._database.execute(statement, self._flow.slug)


def with_defaults(options: Options) -> Options:
    """A flow's options with pgflow's defaults for those it leaves open."""
    return Options(
        options.max_attempts or DEFAULT_OPTIONS.max_attempts,
        options.base_delay or DEFAULT_OPTIONS.base_delay,
        options.timeout or DEFAULT_OPTIONS.timeout,
    )


def _changes(
    prefix: str, row: dict[str, object], options: Options, names: Sequence[str]
) -> list[str]:
    changes = []
    for name in names:
        old, new = row[name], getattr(options, name)
        if old != new:
            inherited = "0" if name == "start_delay" else "the flow's"
            shown = [inherited if value is None else str(value) for value in (old, new)]
            changes.append(f"{prefix}{name}: {shown[0]} -> {shown[1]}")
    return changes


def _listed(slugs: Sequence[str]) -> str:
    return f"[{', '.join(slugs)}]"
