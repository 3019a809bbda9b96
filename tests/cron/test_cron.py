"""pg_cron calls the worker: the real one, on its real schedule."""

import json
import time
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import psycopg
import pytest
from pytest_postgresql.executors import PostgreSQLExecutor

ROOT = Path(__file__).parent.parent.parent


class _Handler(SimpleHTTPRequestHandler):
    def do_GET(self) -> None:
        body = b"<title>Good</title><p>PostgreSQL is a reliable and powerful database system.</p>"
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass


@pytest.mark.timeout(240)
def test_pg_cron_runs_the_example_flow_as_a_role_that_is_no_superuser(
    server: PostgreSQLExecutor, cron_database: str
) -> None:
    with (
        psycopg.connect(
            host=server.host,
            port=server.port,
            user=server.user,
            dbname=cron_database,
            autocommit=True,
        ) as db,
        ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as http,
    ):
        Thread(target=http.serve_forever, daemon=True).start()
        db.execute("""create table websites (
            url text primary key, title text, sentiment jsonb, summary text, tags text[],
            analyzed_at timestamptz not null default now())""")
        source = (ROOT / "flows/analyze_website.py").read_text()
        db.execute("select pgflow_worker.deploy('analyze_website', %s)", [source])
        db.execute("create role cron_worker login")
        db.execute("select pgflow_worker.grant_usage('cron_worker', 'operate')")
        db.execute("grant select, insert, update on websites to cron_worker")
        # Minutes, which every pg_cron knows; the call drains, so that one firing is enough.
        db.execute("""select cron.schedule_in_database('test', '* * * * *',
            $$call pgflow_worker.work('analyze_website', mode => 'drain')$$,
            current_database(), 'cron_worker')""")
        url = f"http://127.0.0.1:{http.server_port}/"
        db.execute("select pgflow.start_flow('analyze_website', %s)", [json.dumps({"url": url})])
        deadline = time.monotonic() + 200
        status = "started"
        while status == "started" and time.monotonic() < deadline:
            time.sleep(0.5)
            [[status]] = db.execute("select status from pgflow.runs").fetchall()
        http.shutdown()
        jobs = db.execute("select status, return_message from cron.job_run_details").fetchall()
        assert status == "completed", jobs
        assert db.execute("select url, title from websites").fetchall() == [(url, "Good")]
        [[report]] = db.execute("select report from pgflow_worker.invocations").fetchall()
        assert (report["mode"], report["completed"]) == ("drain", 5)
