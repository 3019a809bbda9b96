"""What the figures were measured on."""

from __future__ import annotations

import platform
import re
from importlib.metadata import version
from pathlib import Path

import psutil

from bench.cluster import Cluster, Database


def describe(cluster: Cluster, pgflow: Database, revision: str, migrations: Path) -> dict[str, str]:
    """Name the machine, the versions and the settings."""
    [[server]] = cluster.maintenance.rows("select version()")
    [[worker, pgmq]] = pgflow.rows(
        """select
            (select extversion from pg_extension where extname = 'pgflow_worker'),
            (select extversion from pg_extension where extname = 'pgmq')"""
    )
    memory = psutil.virtual_memory().total / 2**30
    return {
        "processor": _processor(),
        "cores": str(psutil.cpu_count()),
        "memory": f"{memory:.0f} GiB",
        "kernel": f"{platform.system()} {platform.release()}",
        "server": re.split(r" on |, ", server)[0],
        "Python": platform.python_version(),
        "pgflow_worker": f"{worker} ({revision})" if revision else worker,
        "pgflow": migrations.name.removeprefix("pgflow-"),
        "pgmq": pgmq,
    }


def libraries() -> dict[str, str]:
    """The versions of what outside the server takes part."""
    return {name: version(name) for name in ("psycopg", "procrastinate", "dbos", "absurd-sdk")}


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
