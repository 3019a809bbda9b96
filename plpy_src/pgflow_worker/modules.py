"""Stored modules: Python source kept in the database, imported into namespaces of its own."""

from __future__ import annotations

import builtins
import itertools
import linecache
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from pgflow_worker.errors import ModuleFailed, QueryCanceled, WorkerError
from pgflow_worker.flow import Flow
from pgflow_worker.tracebacks import format_traceback, reason

_serial = itertools.count(1)
_OWN = __name__.partition(".")[0]  # on a cluster it is another, see boot.py


class StoredModules:
    """A set of stored modules that may import each other by name.

    They are imported on demand under a prefix that no other set shares, so that neither an
    earlier version nor another finder's module of the same name is met in `sys.modules`.

    sources: the modules' text by name.
    """

    def __init__(self, sources: Mapping[str, str]) -> None:
        self.sources = dict(sources)
        self.imports: dict[str, set[str]] = {}
        self._prefix = f"_{_OWN}_{next(_serial)}"
        self._flows: dict[str, list[Flow]] = {}
        self._claimed: dict[str, list[Flow]] = {}
        self._packages: dict[str, ModuleType] = {}
        self._lines: dict[str, tuple[Any, Any]] = {}

    def flows(self, name: str) -> Sequence[Flow]:
        """The flows that a module defines; those it imports belong to the other module.

        Raises ModuleFailed, with the traceback as detail, if the import fails.
        """
        if name not in self._flows:
            try:
                self._import(name)
            except (QueryCanceled, WorkerError):
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
        for filename, (own, former) in self._lines.items():
            if linecache.cache.get(filename) is own:
                linecache.cache.pop(filename)
                if former is not None:
                    linecache.cache[filename] = former

    def _import(self, name: str) -> ModuleType:
        full_name = f"{self._prefix}.{name}"
        if full_name in sys.modules:
            return sys.modules[full_name]
        filename = f"{name.replace('.', '/')}.py"
        source = self.sources[name]
        self._show_lines(filename, source)
        module = ModuleType(full_name)
        module.__package__ = name.rpartition(".")[0]
        namespace: dict[str, Any] = vars(module)
        namespace["__builtins__"] = {**vars(builtins), "__import__": self._importer(name)}
        sys.modules[full_name] = module
        try:
            exec(compile(source, filename, "exec", dont_inherit=True), namespace)
        except BaseException:
            del sys.modules[full_name]
            self._claimed.pop(name, None)
            raise
        self._claim_flows(name, namespace)
        # Imported: in this order, each module after those it imports.
        self._flows[name] = self._claimed.pop(name)
        return module

    def _claim_flows(self, name: str, namespace: Mapping[str, object]) -> None:
        """The flows that a module has by now are its own, unless it got them from another."""
        claimed = [*self._claimed.values(), *self._flows.values()]
        taken = {id(flow) for flows in claimed for flow in flows}
        found = {id(value): value for value in namespace.values() if isinstance(value, Flow)}
        own = self._claimed.setdefault(name, [])
        own += [flow for key, flow in found.items() if key not in taken]

    def _show_lines(self, filename: str, source: str) -> None:
        """Let tracebacks show the source's lines, until forget()."""
        own = (len(source), None, source.splitlines(True), filename)
        former = self._lines.get(filename, (None, linecache.cache.get(filename)))[1]
        self._lines[filename] = (own, former)
        linecache.cache[filename] = own

    def _package_of(self, name: str) -> ModuleType:
        """The outermost package of a dotted name, which `import a.b` binds."""
        *packages, last = name.split(".")
        inner: ModuleType = self._import(name)
        for depth in range(len(packages), 0, -1):
            path = ".".join(packages[:depth])
            package = self._packages.setdefault(path, ModuleType(f"{self._prefix}.{path}"))
            setattr(package, last, inner)
            inner, last = package, packages[depth - 1]
        return inner

    def _importer(self, importing: str) -> Any:
        """The `__import__` of one stored module: stored modules first, then everything else."""

        def stored_import(
            name: str,
            globals: Mapping[str, object] | None = None,  # noqa: A002 - the names of __import__
            locals: Mapping[str, object] | None = None,  # noqa: A002
            fromlist: Sequence[str] | None = (),
            level: int = 0,
        ) -> ModuleType:
            if name == "plpy":
                raise ImportError(
                    "handlers run SQL through tx: Transaction, not through plpy", name="plpy"
                )
            submodules = [f"{name}.{attribute}" for attribute in fromlist or ()]
            stored = [m for m in (name, *submodules) if level == 0 and m in self.sources]
            if stored:
                self.imports.setdefault(importing, set()).update(stored)
                if globals is not None:
                    # Before the other module can import them from this one.
                    self._claim_flows(importing, globals)
                packages = [self._package_of(module) for module in stored]
                if name not in stored:
                    return self._packages[name]
                return self._import(name) if fromlist else packages[0]
            # This module's own, which finds this package on a cluster.
            return __import__(name, globals, locals, fromlist or (), level)

        return stored_import


def imported(name: str, sources: Mapping[str, str]) -> dict[str, str]:
    """The text of a stored module and of those that it imports, directly or through others,

    as far as import statements tell. sources: the text of all.
    """
    import ast

    names = [name]
    for module in names:
        try:
            nodes = ast.walk(ast.parse(sources[module]))
        except SyntaxError:  # nothing of it will run
            continue
        for node in nodes:
            if isinstance(node, ast.Import):
                found = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            else:
                continue
            names += [other for other in found if other in sources and other not in names]
    return {module: sources[module] for module in names}


def _module_failed(name: str, error: BaseException) -> ModuleFailed:
    hint = "Mend the module and deploy it again."
    if isinstance(error, ModuleNotFoundError):
        hint = (
            f'Deploy "{error.name}" first if it is a module of yours; for a third-party package, '
            "install it into the environment named with pgflow_worker.set_environment()."
        )
    return ModuleFailed(
        f'module "{name}" cannot be imported: {reason(error)}',
        detail=format_traceback(error),
        hint=hint,
    )
