"""What keeps stored modules and their environment from working: the part of doctor() in Python."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from pgflow_worker import dialect as sql
from pgflow_worker import environment
from pgflow_worker.database import Database, Statement
from pgflow_worker.definition import Definition
from pgflow_worker.dialect import Dialect
from pgflow_worker.errors import DatabaseError, EnvironmentRefused, ModuleFailed, WorkerError
from pgflow_worker.flow import Flow
from pgflow_worker.modules import StoredModules
from pgflow_worker.registry import Placement


@dataclass(frozen=True)
class Finding:
    """A row of doctor(). cure: None for a deploy of `module` as it is stored."""

    severity: Literal["error", "warning", "note"]
    what: str
    why: str
    cure: str | None = None
    module: str | None = None
    dry_run: bool = False


class Examination:
    """One look at everything that is deployed. Transactions are the caller's.

    sources: the modules' text by name. flows: every deployed flow's module. path: the
    environment's. read_secrets: reads a flow's, and raises DatabaseError if it cannot. placements:
    by flow and step, those on clusters.
    """

    def __init__(
        self,
        database: Database,
        sources: Mapping[str, str],
        flows: Mapping[str, str],
        path: str | None,
        read_secrets: Callable[[Flow], None],
        placements: Mapping[str, Mapping[str | None, Placement | None]],
    ) -> None:
        self._database = database
        self._dialect = Dialect(database)
        self._modules = StoredModules(sources)
        self._flows = flows
        self._path = path
        self._read_secrets = read_secrets
        self._placements = placements
        # Of clusters, by address: why, and the flows with their cures; workers.
        self._out_of_reach: dict[str, tuple[str, list[tuple[str, str]]]] = {}
        self._busy: dict[str, set[str]] = {}

    def findings(self) -> list[Finding]:
        """Everything that was found. The modules are imported, and forgotten again."""
        if self._path is not None:
            try:
                environment.site_packages(self._path)
            except EnvironmentRefused as error:
                # No module could find its packages.
                return [_refused("error", error, "every call fails with PW008")]
        try:
            return list(self._findings())
        finally:
            self._modules.forget()

    def _findings(self) -> Iterator[Finding]:
        if self._path is not None:
            try:
                environment.check(self._path)
            except EnvironmentRefused as error:
                yield _refused("warning", error, "what is changed there runs as the server's user")
        environment.activate(self._path)
        broken = set()
        for module in sorted(self._modules.sources):
            try:
                self._modules.flows(module)
            except WorkerError as error:
                broken.add(module)
                yield self._not_importable(module, error)
        has_pgflow = self._has_pgflow()
        maps = []
        for slug, module in sorted(self._flows.items()):
            if module in broken:
                continue
            flow = next((f for f in self._modules.flows(module) if f.slug == slug), None)
            if flow is None:
                yield Finding(
                    "error",
                    f'module "{module}" no longer defines flow "{slug}"',
                    "every call fails with PW001",
                    module=module,
                )
                continue
            try:
                self._read_secrets(flow)
            except DatabaseError as error:
                why = f"every call fails with {error.sqlstate}"
                yield Finding("error", str(error), why, error.hint)
            if slug in self._placements:
                yield from self._look_at_clusters(flow, module)
            if has_pgflow:
                yield from self._compare(flow, module)
                if any(s.kind == "map" and not s.is_transactional for s in flow.steps.values()):
                    maps.append(slug)
        yield from self._clusters()
        if maps and self._is_untested():
            yield Finding(
                "note",
                "this pgflow's start_tasks, complete_task and fail_task are not known here",
                f"large maps are slow, their tasks are handled singly; flows: {', '.join(maps)}",
                "alter extension pgflow_worker update;  -- to a version that knows this pgflow",
            )

    def _not_importable(self, module: str, error: WorkerError) -> Finding:
        flows = ", ".join(
            f'"{slug}"' for slug, owner in sorted(self._flows.items()) if owner == module
        )
        why = (
            f"every call fails with {error.sqlstate}; flows: {flows}"
            if flows
            else "it cannot be used"
        )
        cause = error.__cause__
        if not isinstance(error, ModuleFailed) or not isinstance(cause, ModuleNotFoundError):
            cure = (
                f"\\set source `cat {shlex.quote(module.replace('.', '/') + '.py')}` \\\\ "
                f"select * from pgflow_worker.deploy('{module}', :'source');"
            )
        elif self._path is None:
            cure = (
                "select pgflow_worker.set_environment('/path/of/a/venv');  -- that has the package"
            )
        else:
            package = (cause.name or "").partition(".")[0]
            python = shlex.quote(f"{self._path}/bin/python")
            cure = f"{python} -m pip install {shlex.quote(package)}"
        return Finding("error", str(error), why, cure)

    def _look_at_clusters(self, flow: Flow, module: str) -> Iterator[Finding]:
        # Which costs time that a database without clusters need not spend.
        from pgflow_worker import offload

        rows = self._placements[flow.slug]
        for slug, row in rows.items():
            unfit = None if row is None else offload.unfit(flow, slug)
            if row is not None and unfit is not None:
                why = f"a row of pgflow_worker.executors sends it to {row.address} in vain"
                yield Finding("warning", unfit, why, _executor(flow.slug, slug))
        code = offload.Code(flow.slug, module, self._modules.sources)
        placed = offload.placed(flow, rows)
        for address in sorted({placement.address for placement in placed.values()}):
            slugs = sorted(slug for slug, place in placed.items() if place.address == address)
            named = sorted({slug if slug in rows else None for slug in slugs}, key=str)
            cure = " ".join(_executor(flow.slug, slug) for slug in named)
            cure += "  -- or mend the cluster"
            if address in self._out_of_reach:
                # It has taken seconds to find out.
                self._out_of_reach[address][1].append((flow.slug, cure))
                continue
            found = offload.examine(flow, code, address, slugs)
            if isinstance(found, str):
                self._out_of_reach[address] = found, [(flow.slug, cure)]
                continue
            problems, busy = found
            why = (
                f'messages of flow "{flow.slug}" rest, without an attempt; its steps there: '
                f"{', '.join(slugs)}"
            )
            for problem in problems:
                yield Finding("error", problem, why, cure)
            self._busy.setdefault(address, set()).update(busy)
        for slug, placement in sorted(placed.items()):
            if flow.secrets and not placement.send_secrets:
                key = slug if slug in rows else None
                yield Finding(
                    "note",
                    f'flow "{flow.slug}" has secrets, and step "{slug}" runs on a cluster without',
                    "secret() fails there",
                    _executor(flow.slug, key, placement),
                )

    def _clusters(self) -> Iterator[Finding]:
        """What was found of clusters, whatever the flow."""
        for what, flows in self._out_of_reach.values():
            slugs = ", ".join(f'"{slug}"' for slug, _ in flows)
            why = f"messages rest, without an attempt; flows: {slugs}"
            yield Finding("error", what, why, flows[0][1])
        for address, workers in sorted(self._busy.items()):
            if workers:
                yield Finding(
                    "note",
                    f"workers of Dask scheduler {address} are busy: {', '.join(sorted(workers))}",
                    "whether they have what flows need is not known",
                    "select * from pgflow_worker.doctor();  -- later",
                )

    def _has_pgflow(self) -> bool:
        # Whether it is in order is looked at elsewhere.
        return bool(
            self._database.execute(
                Statement("select from pg_catalog.pg_namespace where nspname = 'pgflow'")
            )
        )

    def _compare(self, flow: Flow, module: str) -> Iterator[Finding]:
        definition = Definition(self._database, flow, self._dialect)
        differences = definition.differences()
        for difference in differences:
            if difference.matters:
                yield Finding(
                    "error",
                    f'flow "{flow.slug}": {difference.text}',
                    "every call fails with PW003; the ways out: another slug for the flow, or a "
                    "deploy with allow_data_loss => true, which deletes its runs",
                    module=module,
                    dry_run=True,
                )
            else:
                yield Finding(
                    "warning",
                    f'flow "{flow.slug}": {difference.text}',
                    "its messages are parked, and runs that have the step do not end",
                    module=module,
                    dry_run=True,
                )
        changes = [] if differences else definition.changed_options()
        if changes:
            yield Finding(
                "note",
                f'flow "{flow.slug}": options in database and code differ: {", ".join(changes)}',
                "the database's count, until the next deploy",
                module=module,
            )

    def _is_untested(self) -> bool:
        rows = self._database.execute(sql.BODIES)
        return sorted((row["name"], row["body"]) for row in rows) not in sql.TESTED_BODIES


def _executor(flow_slug: str, step_slug: str | None, placement: Placement | None = None) -> str:
    """The statement that lets handlers run in the server, or with the secrets where they are."""
    step = "" if step_slug is None else f", '{step_slug}'"
    address = "null" if placement is None else "'" + placement.address.replace("'", "''") + "'"
    secrets = "" if placement is None else ", send_secrets => true"
    return f"select pgflow_worker.set_executor('{flow_slug}', {address}{step}{secrets});"


def _refused(severity: Literal["error", "warning"], error: EnvironmentRefused, why: str) -> Finding:
    what = str(error)
    if error.detail is not None:
        why = f"{why}. {error.detail}"
    # Those hints end with a line for the shell.
    return Finding(severity, what, why, (error.hint or "").partition(": ")[2])
