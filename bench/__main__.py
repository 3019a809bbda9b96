"""`make bench`: measures everything, prints tables, writes JSON and a plot."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from bench.bars import bars
from bench.cluster import throw_away_cluster
from bench.machine import describe, libraries
from bench.plot import plot
from bench.report import Part, Results, write_docs
from bench.scaling import scaling
from bench.templates import pgflow_template
from bench.workloads import QUICK, Sizes, Workloads

ROOT = Path(__file__).parent.parent
SCALING = "scaling"
EVERYTHING = (*Workloads.names(), SCALING)


def main() -> int:
    options = _options()
    sizes = QUICK if options.quick else Sizes()
    if options.repetitions:
        sizes = replace(sizes, repetitions=options.repetitions)
    migrations = Path(os.environ["PGFLOW_MIGRATIONS"])
    # So that the server is stopped and removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))

    names = options.only or EVERYTHING
    all_series = []
    tables: list[Part] = []
    with throw_away_cluster(os.environ["PG_CONFIG"]) as cluster:
        pgflow = pgflow_template(cluster, migrations)
        machine = describe(cluster, pgflow, os.environ.get("BENCH_REVISION", ""), migrations)
        workloads = Workloads(cluster, pgflow, sizes)
        for name in names:
            if name == SCALING:
                tables += scaling(cluster, pgflow, sizes)
            else:
                all_series += workloads.run(name)

    now = datetime.now(UTC)
    results = Results(
        f"{now:%Y-%m-%d}",
        machine,
        sizes.repetitions,
        all_series,
        bars(all_series, sizes),
        tables,
    )
    print(results.markdown())
    name = f"{now:%Y-%m-%d-%H%M}{'-quick' if options.quick else ''}"
    file = ROOT / f"bench/results/{name}.json"
    file.parent.mkdir(exist_ok=True)
    results.write_json(file)
    plot(file.with_suffix(".png"), all_series)
    print(f"written: {file.relative_to(ROOT)} and .png")
    if options.write_docs and tables:
        write_docs(ROOT / "docs/scaling.md", replace(results, series=[]))
        print("written: docs/scaling.md")
    if options.write_docs and all_series and not results.errors:
        others = results.machine | libraries()
        write_docs(ROOT / "docs/performance.md", replace(results, machine=others, parts=[]))
        for suffix in (".json", ".png"):
            shutil.copyfile(file.with_suffix(suffix), ROOT / f"docs/performance{suffix}")
        print("written: docs/performance.md, .json and .png")
    for error in results.errors:
        print(f"error: {error}", file=sys.stderr)
    return 1 if results.errors else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="small sizes, once each: to try the benchmark itself"
    )
    parser.add_argument(
        "--only",
        action="append",
        choices=EVERYTHING,
        help="measure this workload; may be given several times",
    )
    parser.add_argument("--repetitions", type=int, help="instead of 5")
    parser.add_argument(
        "--write-docs",
        action="store_true",
        help="put the figures into docs/performance.md and docs/scaling.md",
    )
    options = parser.parse_args()
    if options.write_docs and (options.quick or options.only not in (None, [SCALING])):
        parser.error("--write-docs wants everything measured, or scaling, at full size")
    return options


if __name__ == "__main__":
    sys.exit(main())
