"""A flow's definition in the database: its rows and queue, and how they differ from the code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pgflow_worker import codec
from pgflow_worker import dialect as sql
from pgflow_worker.database import Database, Row
from pgflow_worker.dialect import Dialect
from pgflow_worker.errors import FlowMismatch, UnsupportedVersion
from pgflow_worker.flow import Flow, Options, Step

# pgflow.create_flow()'s defaults, for what a flow leaves open.
DEFAULT_OPTIONS = Options(max_attempts=3, base_delay=5, timeout=60)


@dataclass(frozen=True)
class Difference:
    """How code and database differ. `matters`: the flow cannot be run like this."""

    text: str
    matters: bool = True


class Definition:
    """The rows and the queue that pgflow has for a flow. Transactions are the caller's."""

    def __init__(self, database: Database, flow: Flow, dialect: Dialect) -> None:
        self._database = database
        self._flow = flow
        self._dialect = dialect

    def differences(self) -> list[Difference]:
        """How the structure of the flow in the code differs from the one in the database."""
        if not self.exists():
            return [Difference(f'flow "{self._flow.slug}" is in the code, not in the database')]
        stored = {row["step_slug"]: row for row in self._stored_steps()}
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
            if row["queue_name"] != self._flow.slug.lower():
                found.append(
                    Difference(
                        f'step "{slug}" has a queue of its own in the database, '
                        f'"{row["queue_name"]}", which no worker here reads'
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
        return bool(self._database.execute(sql.FLOW, self._flow.slug))

    def _stored_steps(self) -> list[Row]:
        return self._database.execute(self._dialect.steps, self._flow.slug)

    def same_queue(self) -> list[str]:
        """Flows whose slug differs by case only: pgmq would give them the same queue."""
        return [row["flow_slug"] for row in self._database.execute(sql.SAME_QUEUE, self._flow.slug)]

    def ensure_queue(self) -> None:
        """Create what is missing of the flow's row and its queue; what is there stays as it is."""
        options = with_defaults(self._flow.options)
        self._database.execute(
            sql.CREATE_FLOW,
            self._flow.slug,
            options.max_attempts,
            options.base_delay,
            options.timeout,
        )

    def send_missing(self) -> int:
        """Send the messages that unfinished tasks have lost again; their number."""
        sent: int = self._database.execute(sql.SEND_MISSING, self._flow.slug)[0]["sent"]
        return sent

    def check_version(self) -> None:
        """Raise UnsupportedVersion for what the installed pgflow does not have yet."""
        for slug, step in self._flow.steps.items():
            where = f'flow "{self._flow.slug}", step "{slug}"'
            if step.kind == "map" and not self._dialect.has_maps:
                raise _needs(where, "a map step", "0.7")
            if step.options.start_delay is not None and not self._dialect.has_start_delay:
                raise _needs(where, "start_delay", "0.5.3")
            if not step.conditions.are_default and not self._dialect.has_conditions:
                raise _needs(where, "a condition", "0.14")

    def compile(self) -> None:
        """Create the flow, its queue and its steps."""
        if self._dialect.has_compiler:
            shape = codec.encode(_shape(self._flow))
            row = self._database.execute(sql.ENSURE_COMPILED, self._flow.slug, shape)[0]
            answer: Any = codec.decode(row["answer"])
            if answer["status"] != "compiled":
                raise FlowMismatch(
                    f'flow "{self._flow.slug}" was {answer["status"]} by pgflow at the same time',
                    detail="; ".join(answer["differences"]) or None,
                    hint="Somebody else deployed it in this moment: deploy the module again.",
                )
            return
        self.ensure_queue()
        for step in self._flow.steps.values():
            self._database.execute(
                self._dialect.add_step,
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
        row = self._database.execute(sql.FLOW, self._flow.slug)[0]
        changes = _changes("", row, with_defaults(self._flow.options), list(row))
        for row in self._stored_steps():
            step: Step = self._flow.steps[row["step_slug"]]
            names = ["max_attempts", "base_delay", "timeout", "start_delay"]
            changes += _changes(f"{step.slug}.", row, step.options, names)
            changes += _changed_conditions(row, step)
        return changes

    def set_options(self) -> None:
        """Write the code's options, which is safe while runs are under way."""
        options = with_defaults(self._flow.options)
        self._database.execute(
            sql.SET_FLOW_OPTIONS,
            self._flow.slug,
            options.max_attempts,
            options.base_delay,
            options.timeout,
        )
        for step in self._flow.steps.values():
            self._database.execute(
                self._dialect.set_step_options,
                self._flow.slug,
                step.slug,
                step.options.max_attempts,
                step.options.base_delay,
                step.options.timeout,
                step.options.start_delay,
                _json(step.conditions.if_),
                _json(step.conditions.if_not),
                step.conditions.when_unmet,
                step.conditions.when_exhausted,
            )

    def count_runs(self) -> int:
        """How many runs the flow has, finished ones included."""
        count: int = self._database.execute(sql.COUNT_RUNS, self._flow.slug)[0]["runs"]
        return count

    def delete(self) -> None:
        """Delete the flow, its runs with all their data, and its queue with the archive."""
        for statement in sql.DELETE_FLOW:
            self._database.execute(statement, self._flow.slug)


def _shape(flow: Flow) -> dict[str, object]:
    """The flow as pgflow's compiler takes it, steps and dependencies in pgflow's order."""
    options = with_defaults(flow.options)
    return {
        "options": {
            "maxAttempts": options.max_attempts,
            "baseDelay": options.base_delay,
            "timeout": options.timeout,
        },
        "steps": [
            {
                "slug": step.slug,
                "stepType": step.type,
                "dependencies": list(step.dependencies),
                "requiredInputPattern": _pattern(step.conditions.if_),
                "forbiddenInputPattern": _pattern(step.conditions.if_not),
                "whenUnmet": step.conditions.when_unmet,
                "whenExhausted": step.conditions.when_exhausted,
                "options": {
                    "maxAttempts": step.options.max_attempts,
                    "baseDelay": step.options.base_delay,
                    "timeout": step.options.timeout,
                    "startDelay": step.options.start_delay,
                },
            }
            for step in flow.steps.values()
        ],
    }


def _pattern(pattern: object) -> dict[str, object]:
    return {"defined": False} if pattern is None else {"defined": True, "value": pattern}


def _json(pattern: object) -> str | None:
    return None if pattern is None else codec.encode(pattern)


def _changed_conditions(row: Row, step: Step) -> list[str]:
    changes = []
    for name in ("if_", "if_not"):
        old = row[name]
        new = getattr(step.conditions, name)
        if (None if old is None else codec.decode(old)) != new:
            shown = ["none" if text is None else text for text in (old, _json(new))]
            changes.append(f"{step.slug}.{name}: {shown[0]} -> {shown[1]}")
    for name in ("when_unmet", "when_exhausted"):
        old, new = row[name], getattr(step.conditions, name)
        if old != new:
            changes.append(f"{step.slug}.{name}: {old} -> {new}")
    return changes


def _needs(where: str, what: str, version: str) -> UnsupportedVersion:
    return UnsupportedVersion(
        f"{where}: {what} needs pgflow {version} or later",
        hint="Update pgflow with the migrations of a later @pgflow/core.",
    )


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
