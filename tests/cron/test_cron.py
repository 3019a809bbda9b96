"""pg_cron calls the worker: the real one, on its real schedule."""

import json
import re
import time
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from tests.conftest import Connection

ROOT = Path(__file__).parent.parent.parent
OFTEN = """
from pgflow_worker import Flow, Transaction

flow = Flow("often")

@flow.step
def backend(flow_input, tx: Transaction):
    [row] = tx.execute("select backend_type from pg_stat_activity where pid = pg_backend_pid()")
    return [flow_input, row["backend_type"]]
"""


class _Handler(SimpleHTTPRequestHandler):
    def do_GET(self) -> None:
        body = b"<title>Good</title><p>PostgreSQL is a reliable and powerful database system.</p>"
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass


def output_of_run(db: Connection, flow_slug: str, flow_input: object, *, timeout: float) -> Any:
    """Start a run, which pg_cron's job is to complete."""
    [[run_id]] = db.execute(
        "select run_id from pgflow.start_flow(%s, %s)", [flow_slug, json.dumps(flow_input)]
    ).fetchall()
    deadline = time.monotonic() + timeout
    status, output = "started", None
    while status == "started" and time.monotonic() < deadline:
        time.sleep(0.5)
        [[status, output]] = db.execute(
            "select status, output from pgflow.runs where run_id = %s", [run_id]
        ).fetchall()
    jobs = db.execute("select status, return_message from cron.job_run_details").fetchall()
    assert status == "completed", jobs
    return output


@pytest.mark.timeout(240)
def test_pg_cron_runs_the_example_flow_as_a_role_that_is_no_superuser(cron: Connection) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as http:
        Thread(target=http.serve_forever, daemon=True).start()
        cron.execute("""create table websites (
            url text primary key, title text, sentiment jsonb, summary text, tags text[],
            analyzed_at timestamptz not null default now())""")
        source = (ROOT / "flows/analyze_website.py").read_text()
        cron.execute("select pgflow_worker.deploy('analyze_website', %s)", [source])
        cron.execute("create role cron_worker login")
        cron.execute("select pgflow_worker.grant_usage('cron_worker', 'operate')")
        cron.execute("grant select, insert, update on websites to cron_worker")
        # Minutes, which every pg_cron knows; the call drains, so that one firing is enough.
        cron.execute("""select cron.schedule_in_database('test', '* * * * *',
            $$call pgflow_worker.work('analyze_website', mode => 'drain')$$,
            current_database(), 'cron_worker')""")
        url = f"http://127.0.0.1:{http.server_port}/"
        output_of_run(cron, "analyze_website", {"url": url}, timeout=200)
        http.shutdown()
    assert cron.execute("select url, title from websites").fetchall() == [(url, "Good")]
    [[report]] = cron.execute(
        "select report from pgflow_worker.invocations where flow_slug = 'analyze_website'"
    ).fetchall()
    assert (report["mode"], report["completed"]) == ("drain", 5)


def test_pg_cron_fires_every_five_seconds(cron: Connection) -> None:
    [[version]] = cron.execute(
        "select extversion from pg_extension where extname = 'pg_cron'"
    ).fetchall()
    if [int(number) for number in re.findall(r"\d+", version)][:2] < [1, 5]:
        pytest.skip(f"pg_cron {version} has no schedules in seconds, 1.5 has")
    cron.execute("select pgflow_worker.deploy('often', %s)", [OFTEN])
    cron.execute("""select cron.schedule('test', '5 seconds',
        $$call pgflow_worker.work('often', mode => 'drain')$$)""")
    # Less than a minute for both.
    outputs = [output_of_run(cron, "often", number, timeout=25) for number in (1, 2)]
    [[in_background]] = cron.execute("show cron.use_background_workers").fetchall()
    backend = "pg_cron" if in_background == "on" else "client backend"
    assert outputs == [{"backend": [1, backend]}, {"backend": [2, backend]}]


def test_what_pg_cron_has_recorded_of_old_calls_is_removed(cron: Connection) -> None:
    cron.execute("""
        insert into cron.job_run_details (jobid, database, username, command, status, end_time)
        select 1, database, current_user, command, 'succeeded', now() - age::interval
        from (values
            (current_database(), 'CALL pgflow_worker.work(''f'')', '40 days'),
            (current_database(), ' call pgflow_worker.work(''f'')', '20 days'),
            ('another', 'call pgflow_worker.work(''f'')', '40 days'),
            (current_database(), 'vacuum', '40 days')
        ) as recorded (database, command, age)
    """)
    [[result]] = cron.execute("call pgflow_worker.prune_data_older_than('30 days')").fetchall()
    assert result["job_run_details"] == 1
    left = cron.execute("""
        select database = current_database(), command from cron.job_run_details
        where end_time < now() - interval '10 days' order by runid
    """)
    assert left.fetchall() == [
        (True, " call pgflow_worker.work('f')"),
        (False, "call pgflow_worker.work('f')"),
        (True, "vacuum"),
    ]
    cron.execute("delete from cron.job_run_details where end_time < now() - interval '10 days'")
