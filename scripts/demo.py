"""The demo's second half: real pages, real pg_cron, and a look at every step as it finishes.

`make demo` runs it when the server is up; libpq's environment says where that is.
"""

import argparse
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
from psycopg.rows import DictRow, dict_row
from psycopg.types.json import Jsonb

Connection = psycopg.Connection[DictRow]

FLOW = "analyze_website"
PAGES = [
    "tutorial-concepts.html",
    "tutorial-join.html",
    "tutorial-transactions.html",
    "ddl-constraints.html",
    "mvcc-intro.html",
    "transaction-iso.html",
    "explicit-locking.html",
    "wal-reliability.html",
    "routine-vacuuming.html",
    "backup-dump.html",
    "performance-tips.html",
    "plpython-data.html",
]
MISSING_PAGE = "no-such-page.html"
GIVE_UP_AFTER = 240  # seconds; pg_cron before 1.5 fires once a minute


class DemoFailedError(Exception):
    pass


class _QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass


@contextmanager
def serve(directory: Path) -> Iterator[str]:
    """Serve the directory on a free loopback port; yields its URL."""
    handler = partial(_QuietHandler, directory=str(directory))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def deploy(db: Connection, module: Path) -> None:
    db.execute(
        """create table if not exists public.websites (
            url text primary key, title text, sentiment jsonb, summary text, tags text[],
            analyzed_at timestamptz not null default now()
        )"""
    )
    for row in db.execute(
        "select flow_slug, status from pgflow_worker.deploy(%s, %s)",
        [module.stem, module.read_text()],
    ):
        print(f"deployed {module}: flow {row['flow_slug']} {row['status']}")


def schedule(db: Connection) -> int:
    """Let pg_cron call the worker; returns the job's number."""
    [row] = db.execute("select extversion as v from pg_extension where extname = 'pg_cron'")
    version = tuple(int(part) for part in row["v"].replace("-", ".").split(".")[:2])
    if version >= (1, 5):
        every, mode = "5 seconds", "drain"
    else:  # minutes are all it knows
        every, mode = "* * * * *", "wait"
    command = f"call pgflow_worker.work('{FLOW}', mode => '{mode}')"
    [row] = db.execute(
        "select cron.schedule(%s, %s, %s) as jobid",
        [f"pgflow-worker--{db.info.dbname}--{FLOW}--1", every, command],
    )
    print(f"scheduled '{every}' with pg_cron {version[0]}.{version[1]}: {command}")
    return int(row["jobid"])


def start_runs(db: Connection, url: str) -> dict[UUID, str]:
    """One run for each page; returns the page of each run."""
    runs = {}
    for page in [*PAGES, MISSING_PAGE]:
        [row] = db.execute(
            "select run_id from pgflow.start_flow(%s, %s)", [FLOW, Jsonb({"url": f"{url}/{page}"})]
        )
        runs[row["run_id"]] = page
    print(f"started {len(runs)} runs, one of them for a page that does not exist\n")
    return runs


def watch(db: Connection, runs: dict[UUID, str], jobid: int) -> None:
    """Print each step as it finishes, until all runs have ended."""
    print(f"{'elapsed':>8}  {'page':<28}  {'step':<10}  state")
    begun = time.monotonic()
    [row] = db.execute("select clock_timestamp() as t")
    begun_at = row["t"]
    steps_seen: set[tuple[UUID, str]] = set()
    failures_seen: set[int] = set()
    last_line = begun

    def line(page: str, step: str, state: str) -> None:
        nonlocal last_line
        last_line = time.monotonic()
        print(f"{last_line - begun:6.1f} s  {page:<28}  {step:<10}  {state}", flush=True)

    while True:
        # The runs first: when they have ended, all their steps are there to see.
        [running] = db.execute(
            "select count(*) as n from pgflow.runs where run_id = any(%s) and status = 'started'",
            [list(runs)],
        )
        for state in db.execute(
            """select run_id, step_slug, status from pgflow.step_states
            where run_id = any(%s) and status in ('completed', 'failed', 'skipped')
            order by coalesce(completed_at, failed_at), run_id, step_slug""",
            [list(runs)],
        ):
            key = (state["run_id"], state["step_slug"])
            if key not in steps_seen:
                steps_seen.add(key)
                line(runs[state["run_id"]], state["step_slug"], state["status"])
        for failure in db.execute(
            """select runid, return_message from cron.job_run_details
            where jobid = %s and status = 'failed' and start_time >= %s""",
            [jobid, begun_at],
        ):
            if failure["runid"] not in failures_seen:
                failures_seen.add(failure["runid"])
                line("(pg_cron)", "", f"failed: {failure['return_message']}")
        if not running["n"]:
            return
        if len(failures_seen) >= 3:
            raise DemoFailedError("the job that pg_cron runs has failed three times")
        if time.monotonic() - begun > GIVE_UP_AFTER:
            raise DemoFailedError(
                f"{running['n']} runs have not ended after {GIVE_UP_AFTER} seconds"
            )
        if time.monotonic() - last_line > 20:
            line("(waiting for pg_cron)", "", "")
        time.sleep(0.2)


def check_outcome(db: Connection, runs: dict[UUID, str]) -> None:
    """Print what came out, and compare it with what had to."""
    ended = {
        runs[row["run_id"]]: row
        for row in db.execute(
            """select run_id, status, output -> 'saveToDb' as output, (
                select string_agg(error_message, '; ') from pgflow.step_tasks as task
                where task.run_id = run.run_id and status = 'failed'
            ) as error
            from pgflow.runs as run where run_id = any(%s)""",
            [list(runs)],
        )
    }
    print(f"\n{'page':<28}  {'sentiment':>9}  {'tags':<52}  summary")
    wrong = []
    for page in PAGES:
        output = ended[page]["output"]
        if ended[page]["status"] != "completed" or not isinstance(output, dict):
            wrong.append(f"the run for {page} has {ended[page]['status']}: {ended[page]['error']}")
            continue
        tags = shorten(", ".join(output["tags"]), 52)
        summary = shorten(output["summary"], 48)
        print(f"{page:<28}  {output['sentiment']:>+9.2f}  {tags:<52}  {summary}")
    missing = ended[MISSING_PAGE]
    print(f"{MISSING_PAGE:<28}  {missing['status']}: {missing['error']}")
    if missing["status"] != "failed" or "404" not in missing["error"]:
        wrong.append(f"the run for {MISSING_PAGE} has {missing['status']}; it had to fail with 404")
    if wrong:
        raise DemoFailedError("\n".join(wrong))
    print(f"\n{len(PAGES)} runs completed, and the one for the missing page failed, as it should.")


def shorten(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 3].rstrip() + "..."


def show_cron(db: Connection, jobid: int) -> None:
    """What pg_cron says of its last calls."""
    print("\npg_cron's last calls:", file=sys.stderr)
    for row in db.execute(
        """select start_time, status, return_message from cron.job_run_details
        where jobid = %s order by runid desc limit 5""",
        [jobid],
    ):
        print(
            f"  {row['start_time']}  {row['status']}  {(row['return_message'] or '').strip()}",
            file=sys.stderr,
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("flow", type=Path, help="the module to deploy")
    parser.add_argument("--manual", type=Path, required=True, help="PostgreSQL's HTML manual")
    arguments = parser.parse_args()
    jobid = None
    with (
        serve(arguments.manual) as url,
        psycopg.connect("", autocommit=True, row_factory=dict_row) as db,
    ):
        try:
            deploy(db, arguments.flow)
            jobid = schedule(db)
            runs = start_runs(db, url)
            watch(db, runs, jobid)
            check_outcome(db, runs)
        except (DemoFailedError, psycopg.Error) as error:
            details = [str(error)]
            if isinstance(error, psycopg.Error):
                details += filter(None, [error.diag.message_detail, error.diag.message_hint])
            print("\nwhat went wrong:", *details, sep="\n", file=sys.stderr)
            if jobid is not None:
                show_cron(db, jobid)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
