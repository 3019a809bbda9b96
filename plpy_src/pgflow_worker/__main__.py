"""python -m pgflow_worker compile flows/*.py: the deploy() calls as SQL, for any migration tool."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

from pgflow_worker.deploy import check_name
from pgflow_worker.errors import NameRefused, WorkerError
from pgflow_worker.modules import StoredModules


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m pgflow_worker")
    commands = parser.add_subparsers(dest="command", required=True)
    compiling = commands.add_parser(
        "compile",
        help="check modules and print the SQL that deploys them",
        description="Checks Python modules with flows and prints the SQL that deploys them, "
        "modules that others import first.",
    )
    compiling.add_argument("files", nargs="+", type=Path, metavar="FILE.py")
    files = parser.parse_args(arguments).files
    try:
        sys.stdout.write(compile_modules(files))
    except (OSError, UnicodeDecodeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except WorkerError as error:
        print(f"error: {error}", file=sys.stderr)
        for label, text in (("detail", error.detail), ("hint", error.hint)):
            if text:
                print(f"{label}: {text}", file=sys.stderr)
        return 1
    return 0


def compile_modules(files: Sequence[Path]) -> str:
    """The SQL that deploys these files' modules. Raises WorkerError, OSError."""
    sources: dict[str, str] = {}
    for path in files:
        check_name(path.stem)
        if path.stem in sources:
            raise NameRefused(
                f'two files are named "{path.stem}.py"', hint="A module's name is its file's."
            )
        sources[path.stem] = path.read_text(encoding="utf-8-sig")
    modules = StoredModules(sources)
    try:
        # What a module prints while it is imported is no SQL.
        with redirect_stdout(sys.stderr):
            for name in modules.sources:
                for flow in modules.flows(name):
                    _ = flow.steps  # raises FlowError
        return "".join(
            f"select * from pgflow_worker.deploy('{name}', {_quoted(modules.sources[name])});\n"
            for name in modules.imported
        )
    finally:
        modules.forget()


def _quoted(source: str) -> str:
    tag = "python"
    while f"${tag}" in source:
        tag += "_"
    return f"${tag}${source}${tag}$"


if __name__ == "__main__":
    sys.exit(main())
