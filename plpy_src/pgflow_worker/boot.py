"""Import code that was sent by value: run as text in processes of a cluster, which have none.

Written for old Pythons as well, so that what is too old is refused in words.
"""

from __future__ import annotations

import builtins
import importlib
import json
import sys
import zlib
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any

OLDEST = (3, 11)
KEPT = 16  # sets of code in one process; what is dropped is sent again


def load(name: str, code: bytes) -> Any:
    """The module `remote` of the package in `code`, which is imported under a name of its own.

    code: compressed JSON, see offload.Code. Raises RuntimeError if this Python is too old.
    """
    if sys.version_info < OLDEST:
        raise RuntimeError(
            f"Python {_dotted(sys.version_info[:3])} is too old: it takes {_dotted(OLDEST)}"
        )
    content = json.loads(zlib.decompress(code))
    if name not in sys.modules:
        _forget_unused()
        sys.meta_path.append(Sent(name, content["package"]))
    remote = importlib.import_module(name + ".remote")
    remote.prepare(content["modules"], content["module"], content["flow_slug"])
    sys.modules[name + ".ready"] = remote  # which other tasks look for
    return remote


def examine(name: str, code: bytes) -> Any:
    """What remote.examine() says, and leave no code here that was not here before."""
    was_here = name + ".ready" in sys.modules
    remote = load(name, code)
    try:
        return remote.examine()
    finally:
        if not was_here and not remote.running:
            _forget(name, remote)


class Sent(MetaPathFinder, Loader):
    """Finds and loads the modules of one package. sources: their text by their names in it."""

    def __init__(self, name: str, sources: dict[str, str]) -> None:
        self.name = name
        self._sources = sources

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:  # noqa: ARG002
        """The spec of one of the package's modules."""
        package, _, module = fullname.partition(".")
        if package != self.name or (module or "__init__") not in self._sources:
            return None
        return ModuleSpec(fullname, self, is_package=not module)

    def exec_module(self, module: Any) -> None:
        """Run a module's text, in which the package has its usual name."""
        file = module.__name__.partition(".")[2] or "__init__"
        module.__file__ = f"/{self.name}/{file}.py"
        module.__builtins__ = {**vars(builtins), "__import__": self._import}
        exec(compile(self._sources[file], module.__file__, "exec", dont_inherit=True), vars(module))

    def _import(self, name: str, *args: Any, **kwargs: Any) -> Any:
        package, dot, module = name.partition(".")
        if package == "pgflow_worker":
            name = self.name + dot + module
        return builtins.__import__(name, *args, **kwargs)


def _forget_unused() -> None:
    # Not by the class, of which every run of this text has its own.
    sent: list[Any] = [f for f in sys.meta_path if type(f).__name__ == Sent.__name__]
    ready = [(finder.name, sys.modules.get(finder.name + ".ready")) for finder in sent]
    idle = [(name, remote) for name, remote in ready if remote is not None and not remote.running]
    idle.sort(key=lambda found: found[1].last_used)
    for name, remote in idle[: max(0, len(sent) + 1 - KEPT)]:
        _forget(name, remote)


def _forget(name: str, remote: Any) -> None:
    remote.close()
    sys.meta_path[:] = [finder for finder in sys.meta_path if getattr(finder, "name", "") != name]
    for module in [module for module in list(sys.modules) if name in module.partition(".")[0]]:
        sys.modules.pop(module, None)


def _dotted(version: Any) -> str:
    return ".".join(map(str, version))
