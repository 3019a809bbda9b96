"""Stored modules: Python source kept in the database, imported into namespaces of its own."""

from __future__ import annotations

import builtins
import hashlib
import itertools
import linecache
import sys
import traceback
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from pgflow_worker.errors import ModuleFailed, QueryCanceled
from pgflow_worker.flow import Flow

_serial = itertools.count(1)


class StoredModules:
    """A set of stored modules that may import each other by name.

    They are imported on demand under a prefix that no other set shares, so that neither an
    earlier version nor another finder's module of the same name is met in `sys.modules`.

    sources: the modules' text by name.
    """

    def __init__(self, sources: Mapping[str, str]) -> None:
        self.sources = dict(sources)
        self.digest = hashlib.sha256(repr(sorted(self.sources.items())).encode()).hexdigest()
        self.imports: dict[str, set[str]] = {}
        self._prefix = f"_pgflow_worker_{self.digest[:12]}_{next(_serial)}"
        self._flows: dict[str, list[Flow]] = {}

    def flows(self, name: str) -> Sequence[Flow]:
        """The flows that a module defines; those it imports belong to the other module.

        Raises ModuleFailed, with the traceback as detail, if the import fails.
        """
        if name not in self._flows:
            try:
                self._import(name)
            except QueryCanceled:
                raise
            except BaseException as error:
                raise _module_failed(name, error) from error
        return self._flows[name]

    @property
    def imported(self) -> list[str]:
        """The modules imported so far, each after those it imports."""
        return list(self._flows)

    def importers(self, name: str) -> list[str]:
        """The modules imported so far that import this one, directly or through others."""
        found = [name]
        for module in found:
            found += [m for m, used in self.imports.items() if module in used and m not in found]
        return found[1:]

    def forget(self) -> None:
        """Take the modules out of `sys.modules`."""
        for name in [name for name in sys.modules if name.startswith(f"{self._prefix}.")]:
            del sys.modules[name]

    def _import(self, name: str) -> ModuleType:
        full_name = f"{self._prefix}.{name}"
        if full_name in sys.modules:
            return sys.modules[full_name]
        filename = f"{name.replace('.', '/')}.py"
        source = self.sources[name]
        linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
        module = ModuleType(full_name)
        module.__package__ = name.rpartition(".")[0]
        namespace: dict[str, Any] = vars(module)
        namespace["__builtins__"] = {**vars(builtins), "__import__": self._importer(name)}
        sys.modules[full_name] = module
        try:
            exec(compile(source, filename, "exec", dont_inherit=True), namespace)
        except BaseException:
            del sys.modules[full_name]
            raise
        defined = {id(flow) for flows in self._flows.values() for flow in flows}
        self._flows[name] = [
            value
            for value in {id(v): v for v in namespace.values() if isinstance(v, Flow)}.values()
            if id(value) not in defined
        ]
        return module

    def _importer(self, importing: str) -> Any:
        """The `__import__` of one stored module: stored modules first, then everything else."""

        def stored_import(
            name: str,
            globals: Mapping[str, object] | None = None,  # noqa: A002 - the names of __import__
            locals: Mapping[str, object] | None = None,  # noqa: A002
            fromlist: Sequence[str] | None = (),
            level: int = 0,
        ) -> ModuleType:
            if level == 0 and name in self.sources:
                self.imports.setdefault(importing, set()).add(name)
                return self._import(name)
            return builtins.__import__(name, globals, locals, fromlist or (), level)

        return stored_import


def _module_failed(name: str, error: BaseException) -> ModuleFailed:
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_globals.get("__name__") == __name__:
        frames = frames.tb_next
    lines = traceback.format_exception(error.with_traceback(frames))
    reason = traceback.format_exception_only(error)[-1].strip()
    hint = "Mend the module and deploy it again."
    if isinstance(error, ModuleNotFoundError):
        hint = (
            f'Deploy "{error.name}" first if it is a module of yours; for a third-party package, '
            "install it into the environment named with pgflow_worker.set_environment()."
        )
    return ModuleFailed(
        f'module "{name}" cannot be imported: {reason}', detail="".join(lines), hint=hint
    )
