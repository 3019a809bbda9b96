"""Deploy: store a module and make its flows runnable."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec

from pgflow_worker.database import Database
from pgflow_worker.definition import DEFAULT_OPTIONS, Definition
from pgflow_worker.dialect import Dialect
from pgflow_worker.errors import (
    FlowBusy,
    FlowError,
    InvalidArgument,
    ModuleFailed,
    NameRefused,
)
from pgflow_worker.flow import Flow
from pgflow_worker.modules import StoredModules
from pgflow_worker.registry import Registry

# Seconds that a step may be allowed beyond its flow, of the 30 that pgflow waits: to be stored in.
REAPER_MARGIN = 20
MODULE_NAME = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*(\.[a-zA-Z_][a-zA-Z0-9_]*)*")
MAX_MODULE_NAME = 200  # characters: far below what an index can hold


_LOST_SOURCE = (
    "Has \\set source found the file? To take a module away: select pgflow_worker.undeploy('{}');"
)


@dataclass(frozen=True)
class Deployed:
    """A row of deploy(): what became of a flow, and what changed."""

    flow_slug: str | None
    status: str
    changes: Sequence[str] = ()


class Deployment:
    """One call of deploy(), in the caller's transaction."""

    def __init__(self, database: Database, *, dry_run: bool, allow_data_loss: bool) -> None:
        self._database = database
        self._registry = Registry(database)
        self._dialect = Dialect(database)
        self._dry_run = dry_run
        self._allow_data_loss = allow_data_loss

    def deploy(self, module: str, source: str | None) -> list[Deployed]:
        """Store the module and bring its flows, and those of modules that import it, up to date.

        source: the module's text; None for the text of the module that is importable here.
        Raises NameRefused, ModuleFailed, FlowError, FlowMismatch, FlowBusy or SecretUnavailable.
        """
        check_name(module)
        is_given = source is not None
        if source is None:
            source = _importable_source(module)
        if not source.strip():
            raise InvalidArgument(
                f'the source of module "{module}" is empty', hint=_LOST_SOURCE.format(module)
            )
        self._registry.lock()
        sources = self._registry.sources()
        if is_given and module not in sources:
            _check_free(module)
        changed = sources.get(module) != source
        modules = StoredModules({**sources, module: source})
        try:
            flows = self._load(modules, module)
            self._check_owners(flows)
            former = [slug for slug, owner in self._registry.flows().items() if owner == module]
            if former and not flows[module]:
                raise InvalidArgument(
                    f'module "{module}" has no flow any more', hint=_LOST_SOURCE.format(module)
                )
            if changed and not self._dry_run:
                self._registry.store(module, source)
            deployed = [
                self._deploy_flow(flow, owner) for owner, owned in flows.items() for flow in owned
            ]
        finally:
            modules.forget()
        own = {flow.slug for flow in flows[module]}
        removed = [self._remove(slug) for slug in former if slug not in own]
        return deployed + removed or [Deployed(None, "stored")]

    def _load(self, modules: StoredModules, module: str) -> dict[str, Sequence[Flow]]:
        """The flows of a module and of those that import it, by module."""
        flows = {module: modules.flows(module)}
        for other in sorted(modules.sources):
            try:
                modules.flows(other)
            except (ModuleFailed, FlowError):
                if other in modules.importers(module):
                    raise
                # Broken before, and not by this module: work() will say so.
        flows.update((other, modules.flows(other)) for other in modules.importers(module))
        return flows

    def _check_owners(self, flows: dict[str, Sequence[Flow]]) -> None:
        owners = self._registry.flows()
        seen: dict[str, str] = {}
        for module, flow in [(name, flow) for name in flows for flow in flows[name]]:
            owner = owners.get(flow.slug, module)
            if owner != module:
                raise NameRefused(
                    f'flow "{flow.slug}" of module "{module}" belongs to module "{owner}"',
                    hint="Give it another slug, or first: "
                    f"select pgflow_worker.undeploy('{owner}');",
                )
            others = self._definition(flow).same_queue()
            twin = seen.get(flow.slug.lower())
            if twin == flow.slug:
                raise NameRefused(
                    f'flow "{flow.slug}" is defined twice', hint="Give one of them another slug."
                )
            if twin is not None:
                others.append(twin)
            seen[flow.slug.lower()] = flow.slug
            if others:
                raise NameRefused(
                    f'flow "{flow.slug}" and flow "{others[0]}" differ by case only',
                    hint="pgmq would give both the same queue: choose another slug.",
                )

    def _deploy_flow(self, flow: Flow, module: str) -> Deployed:
        definition = self._definition(flow)
        definition.check_version()
        if self._dialect.has_hasty_reaper:
            _check_timeouts(flow)
        if flow.secrets:
            # Imported only by those that need it.
            from pgflow_worker import secrets

            secrets.read(self._database, flow.slug, flow.secrets)
        status, changes = self._bring_up_to_date(definition, flow)
        if not self._dry_run:
            self._registry.set_flow(flow.slug, module)
        return Deployed(flow.slug, status, changes)

    def _definition(self, flow: Flow) -> Definition:
        return Definition(self._database, flow, self._dialect)

    def _bring_up_to_date(self, definition: Definition, flow: Flow) -> tuple[str, Sequence[str]]:
        steps = flow.steps
        if not definition.exists():
            if not self._dry_run:
                definition.compile()
            return "compiled", [f'step "{slug}"' for slug in steps]
        differences = definition.differences()
        texts = [difference.text for difference in differences]
        if differences and not self._allow_data_loss:
            if self._dry_run:
                return "mismatch", texts
            raise definition.mismatch(differences)
        if differences:
            busy = [slot.pid for slot in self._registry.slots(flow.slug) if slot.pid is not None]
            if busy:
                raise FlowBusy(
                    f'flow "{flow.slug}" has a running worker, pid {busy[0]}',
                    hint="Wait until it ends, sooner after: "
                    f"select pgflow_worker.pause('{flow.slug}');",
                )
            texts.append(f"runs deleted: {definition.count_runs()}")
            if not self._dry_run:
                definition.delete()
                self._registry.forget_attempts(flow.slug)
                definition.compile()
            return "recompiled", texts
        changes = definition.changed_options()
        status = "updated" if changes else "verified"
        if not self._dry_run:
            definition.ensure_queue()
            if changes:
                definition.set_options()
            sent = definition.send_missing()
            if sent:
                changes.append(f"messages sent again: {sent}")
        return status, changes

    def _remove(self, flow_slug: str) -> Deployed:
        if not self._dry_run:
            self._registry.remove_flow(flow_slug)
        return Deployed(flow_slug, "removed")


def _check_timeouts(flow: Flow) -> None:
    """Refuse a step that pgflow would take for stalled while its handler runs."""
    limit = (flow.options.timeout or DEFAULT_OPTIONS.timeout or 0) + REAPER_MARGIN
    slow = [slug for slug, step in flow.steps.items() if (step.options.timeout or 0) > limit]
    if slow:
        raise FlowError(
            f'step "{slow[0]}" of flow "{flow.slug}" may take {flow.steps[slow[0]].options.timeout}'
            f" s, and pgflow takes a task for stalled {limit + 10} s after its start",
            hint="Raise the timeout of the flow, and give the other steps timeouts of their own.",
        )


def check_name(module: str) -> None:
    """Refuse what is no name for a module, or one of Python's own. Raises NameRefused."""
    if module is None or not MODULE_NAME.fullmatch(module):
        raise NameRefused(
            f'"{module}" is not a name for a module',
            hint="A module's name has letters, digits and underscores, like its file without .py.",
        )
    if len(module) > MAX_MODULE_NAME:
        raise NameRefused(
            f'the name of module "{module:.40}..." has {len(module)} characters, the limit is '
            f"{MAX_MODULE_NAME}",
            hint="Choose a shorter name.",
        )
    if module.endswith(".py"):
        raise NameRefused(
            f'"{module}" is the name of a file',
            hint=f'A module\'s name is without .py: "{module.removesuffix(".py")}".',
        )
    if module.partition(".")[0] in sys.stdlib_module_names:
        raise NameRefused(f'module "{module}" is part of Python', hint="Choose another name.")


def _check_free(module: str) -> None:
    """Refuse a name under which a stored module would hide one that is importable here."""
    if _find(module) is not None:
        raise NameRefused(
            f'module "{module}" exists already in this server\'s Python',
            hint="Choose another name. To store the module that the server can import, leave out "
            "its source.",
        )


def _importable_source(module: str) -> str:
    """The text of a module that the server's Python can import."""
    spec = _find(module)
    if spec is None or spec.loader is None:
        raise InvalidArgument(
            f'no module "{module}" can be imported here',
            hint="Give its text as the second argument. In psql: "
            "\\set source `cat my_module.py` and then "
            "select * from pgflow_worker.deploy('my_module', :'source');",
        )
    get_source = getattr(spec.loader, "get_source", None)
    source = get_source(spec.name) if get_source is not None else None
    if not isinstance(source, str):
        raise InvalidArgument(
            f'module "{module}" has no source text', hint="Give its text as the second argument."
        )
    return source


def _find(module: str) -> ModuleSpec | None:
    try:
        return importlib.util.find_spec(module)
    except Exception:  # no such package, or one that fails while it is imported
        return None
