"""Secrets from files and from Vault, in a real server."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.conftest import Connection
from tests.database.conftest import Session, counts

Role = Callable[[str | None], Session]

VALUE = "sk-very-secret"
# A stand-in with the columns that are read.
VAULT = f"""
    create schema vault;
    create table vault.secrets (name text, secret text);
    create view vault.decrypted_secrets as
        select name, reverse(secret) as decrypted_secret from vault.secrets;
    insert into vault.secrets values ('key', reverse('{VALUE}'))
"""
FLOW = """
    from pgflow_worker import secret
    flow = Flow("f", secrets=["key"], max_attempts=1)

    @flow.step
    def step(flow_input):
        return secret(flow_input.get("name", "key"))
"""


@pytest.fixture
def directory(session: Session, tmp_path: Path) -> Path:
    """The directory that is set, with one secret."""
    path = tmp_path / "secrets"
    path.mkdir(0o700)
    put(path, "key", VALUE)
    session.run("select pgflow_worker.set_secrets(%s)", str(path))
    return path


def put(directory: Path, name: str, value: str) -> None:
    (directory / name).write_text(value + "\n")
    (directory / name).chmod(0o600)


def refusal(call: Callable[[], object]) -> psycopg.errors.Diagnostic:
    with pytest.raises(psycopg.Error) as caught:
        call()
    assert caught.value.sqlstate == "PW014"
    return caught.value.diag


def output(session: Session) -> Any:
    return session.value("select output from pgflow.step_tasks where status = 'completed'")


def everything(session: Session) -> str:
    """What is stored anywhere, apart from outputs."""
    return str(
        session.value("""
            select concat(
                (select string_agg(to_jsonb(t) - 'output' #>> '{}', '') from pgflow.step_tasks t),
                (select string_agg(to_jsonb(t) - 'output' #>> '{}', '') from pgflow.runs t),
                (select string_agg(to_jsonb(t) - 'output' #>> '{}', '') from pgflow.step_states t),
                (select string_agg(to_jsonb(t) #>> '{}', '') from pgflow_worker.attempts t),
                (select string_agg(to_jsonb(t) #>> '{}', '') from pgflow_worker.invocations t),
                (select string_agg(to_jsonb(t) #>> '{}', '') from pgflow_worker.settings t)
            )
        """)
    )


# Where they come from


def test_handlers_of_every_kind_get_them_from_files(session: Session, directory: Path) -> None:
    session.deploy("""
        from pgflow_worker import secret
        flow = Flow("f", secrets=["key"])

        @flow.step
        def main():
            return secret("key")

        @flow.step
        def transactional(tx: Transaction):
            return tx.execute("select $1 as value", [secret("key")])[0]["value"]

        @flow.step(thread=True)
        def thread():
            return secret("key")

        @flow.step
        async def coroutine():
            return secret("key")
    """)
    session.start("f")
    session.work("f", mode="drain")
    assert session.rows("select step_slug, output #>> '{}' from pgflow.step_tasks order by 1") == [
        ("coroutine", VALUE),
        ("main", VALUE),
        ("thread", VALUE),
        ("transactional", VALUE),
    ]


def test_work_batch_gives_them_too(session: Session, directory: Path) -> None:
    session.deploy(FLOW)
    session.start("f")
    assert session.work_batch("f")["completed"] == 1
    assert output(session) == VALUE


def test_vault_is_used_where_it_exists(session: Session) -> None:
    session.run(VAULT)
    session.deploy(FLOW)
    session.start("f")
    assert session.work("f")["completed"] == 1
    assert output(session) == VALUE


def test_with_vault_no_directory_can_be_set(session: Session, tmp_path: Path) -> None:
    session.run(VAULT)
    diag = refusal(lambda: session.run("select pgflow_worker.set_secrets(%s)", str(tmp_path)))
    assert diag.message_primary == "secrets are read from Vault here, not from files"
    session.run("select pgflow_worker.set_secrets(null)")


@pytest.mark.parametrize("what", ["schema vault", "view vault.decrypted_secrets"])
def test_a_vault_of_an_ordinary_role_runs_no_code_as_the_owner(
    session: Session, role: Role, what: str
) -> None:
    session.run(VAULT)
    name = role(None).connection.info.user
    session.run(f"grant create on schema vault to {name}; alter {what} owner to {name}")
    diag = refusal(lambda: session.deploy(FLOW))
    assert diag.message_primary == 'flow "f" needs secret "key", but Vault is not a superuser\'s'


def test_a_changed_secret_is_read_by_the_next_call(session: Session, directory: Path) -> None:
    session.deploy(FLOW)
    put(directory, "key", "another value")
    session.start("f")
    session.work("f")
    assert output(session) == "another value"


def test_a_flow_without_secrets_looks_for_none(session: Session, directory: Path) -> None:
    session.deploy('flow = Flow("f")\n@flow.step\ndef step(): return 1\n')
    session.run("alter function pgflow_worker._load_secrets() rename to renamed")
    session.start("f")
    assert session.work("f")["completed"] == 1


# Which are refused


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o660, 0o700])
def test_a_file_that_others_may_read_is_refused(
    session: Session, directory: Path, mode: int
) -> None:
    (directory / "key").chmod(mode)
    diag = refusal(lambda: session.deploy(FLOW))
    assert diag.message_primary == (
        f'flow "f" needs secret "key", but file "{directory}/key" has mode {mode:04o}, '
        "not 0600 or 0400"
    )
    assert diag.message_hint == f"As root: chmod 600 {directory}/key"
    (directory / "key").chmod(0o400)
    assert session.deploy(FLOW)[0][1] == "compiled"


def test_deploy_names_a_missing_file_and_stores_nothing(session: Session, directory: Path) -> None:
    (directory / "key").unlink()
    user = session.value("select current_user")  # who runs the tests runs the server
    for dry_run in (False, True):
        diag = refusal(partial(session.deploy, FLOW, dry_run=dry_run))
        assert diag.message_primary == (
            f'flow "f" needs secret "key", and there is no file "{directory}/key"'
        )
        assert diag.message_hint == (
            f"As root: install -o {user} -m 600 /dev/stdin {directory}/key and then the value, "
            "Enter and Ctrl-D."
        )
    assert session.value("select count(*) from pgflow.flows") == 0
    assert session.value("select count(*) from pgflow_worker.modules") == 0


def test_deploy_names_what_vault_lacks(session: Session) -> None:
    session.run(VAULT)
    session.run("update vault.secrets set name = 'other'")
    diag = refusal(lambda: session.deploy(FLOW))
    assert diag.message_primary == ('flow "f" needs secret "key", and Vault has none of that name')
    assert diag.message_hint == "Create it: select vault.create_secret('...', 'key');"


def test_deploy_says_how_to_set_a_directory(session: Session) -> None:
    diag = refusal(lambda: session.deploy(FLOW))
    assert diag.message_primary == (
        'flow "f" needs secret "key", and no directory of secrets is set'
    )
    assert "select pgflow_worker.set_secrets('/etc/pgflow_worker/secrets');" in (
        diag.message_hint or ""
    )


def test_work_without_it_starts_nothing_and_goes_on_when_it_is_there(
    session: Session, directory: Path
) -> None:
    session.deploy(FLOW)
    session.start("f")
    (directory / "key").unlink()
    diag = refusal(lambda: session.work("f"))
    assert "there is no file" in (diag.message_primary or "")
    assert "install" in (diag.message_hint or "")
    assert session.rows("select status, attempts_count from pgflow.step_tasks") == [("queued", 0)]
    [(error,)] = session.rows("select report ->> 'sqlstate' from pgflow_worker.invocations")
    assert error == "PW014"
    put(directory, "key", VALUE)
    assert session.work("f")["completed"] == 1


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("secrets", 'directory of secrets "secrets" is not an absolute path'),
        ("/nowhere", '"/nowhere" is not a directory that the server can find'),
        ("/etc/passwd", '"/etc/passwd" is not a directory that the server can find'),
    ],
)
def test_a_directory_that_is_none_is_refused(session: Session, path: str, message: str) -> None:
    diag = refusal(lambda: session.run("select pgflow_worker.set_secrets(%s)", path))
    assert diag.message_primary == message


def test_the_data_directory_is_refused(session: Session) -> None:
    path = session.value("select current_setting('data_directory')") + "/base"
    diag = refusal(lambda: session.run("select pgflow_worker.set_secrets(%s)", path))
    assert diag.message_primary == (
        f'"{path}" is in the server\'s data directory, and so in its backups'
    )


@pytest.mark.parametrize("what", ["", ".."])
def test_a_directory_that_others_may_write_is_refused(
    session: Session, directory: Path, what: str
) -> None:
    loose = (directory / what).resolve()
    loose.chmod(0o777)
    diag = refusal(lambda: session.run("select pgflow_worker.set_secrets(%s)", str(directory)))
    assert diag.message_primary == (
        f'"{loose}" can be written by others, who could put other secrets there'
    )
    assert diag.message_hint == f"Take that away: chmod go-w {loose}"


def test_a_link_is_followed_once(session: Session, directory: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(directory)
    session.run("select pgflow_worker.set_secrets(%s)", str(link))
    assert session.value("select value from pgflow_worker.settings") == os.path.realpath(directory)
    session.run("select pgflow_worker.set_secrets(null)")
    assert session.rows("select value from pgflow_worker.settings") == []


# Who gets them


def test_an_undeclared_one_is_refused(session: Session, directory: Path) -> None:
    put(directory, "other", "not for f")
    session.deploy(FLOW)
    session.start("f", {"name": "other"})
    assert session.work("f")["failed"] == 1
    assert session.value("select error_message from pgflow.step_tasks").startswith(
        'LookupError: flow "f" does not declare secret "other": '
        'write Flow("f", secrets=["other"]) ('
    )


def test_a_module_that_is_imported_gets_none(session: Session, directory: Path) -> None:
    with pytest.raises(psycopg.Error) as caught:
        session.deploy(FLOW + '\n    KEY = secret("key")\n')
    assert caught.value.sqlstate == "PW005"
    assert 'RuntimeError: secret "key" was asked for while no handler runs' in str(caught.value)


def test_a_worker_of_all_flows_gives_each_its_own(
    session: Session, connect: Callable[..., Connection], directory: Path
) -> None:
    put(directory, "other", "the other's")
    for slug, declared in (("a", '["key"]'), ("b", '["other"]'), ("c", "[]")):
        session.deploy(
            f"""
            from pgflow_worker import secret
            flow = Flow("{slug}", secrets={declared}, max_attempts=1)

            @flow.step
            def step():
                found = []
                for name in ("key", "other"):
                    try:
                        found.append(secret(name))
                    except LookupError:
                        found.append(None)
                return found
            """,
            module=f"module_{slug}",
        )
        session.start(slug)
    Session(connect()).run("call pgflow_worker.work(mode => 'drain')")
    assert session.rows("select flow_slug, output from pgflow.step_tasks order by 1") == [
        ("a", [VALUE, None]),
        ("b", [None, "the other's"]),
        ("c", [None, None]),
    ]


def test_a_worker_of_all_flows_goes_on_besides_one_whose_secret_is_missing(
    session: Session, directory: Path
) -> None:
    session.deploy(FLOW)
    session.deploy('flow = Flow("g")\n@flow.step\ndef step(): return 1\n', module="other_module")
    session.start("f")
    session.start("g")
    (directory / "key").unlink()
    refusal(lambda: session.run("call pgflow_worker.work(mode => 'drain')"))
    assert session.rows("select flow_slug, status from pgflow.runs order by 1") == [
        ("f", "started"),
        ("g", "completed"),
    ]


@pytest.mark.parametrize("source", ["files", "vault"])
def test_a_worker_that_is_no_superuser_gets_them(
    session: Session, role: Role, directory: Path, source: str
) -> None:
    if source == "vault":
        session.run(VAULT)
    session.deploy(FLOW)
    session.start("f")
    assert counts(role("operate").work("f")) == {"completed": 1}
    assert output(session) == VALUE


@pytest.mark.parametrize("source", ["files", "vault"])
def test_sql_gets_no_values(session: Session, role: Role, directory: Path, source: str) -> None:
    if source == "vault":
        session.run(VAULT)
    session.deploy("""
        from pgflow_worker import secret
        flow = Flow("f", secrets=["key"])

        @flow.step
        def step(tx: Transaction):
            assert secret("key")
            return tx.execute("select pgflow_worker._load_secrets()")
    """)
    operator = role("operate")
    operator.start("f")
    # Before a call, from a handler's SQL, and in the session in which one has read them.
    assert operator.value("select pgflow_worker._load()") == {}
    assert operator.value("select pgflow_worker._load_secrets()") == {}
    operator.work("f")
    assert output(session) == [{"_load_secrets": {}}]
    assert operator.value("select pgflow_worker._load_secrets()") == {}
    for statement in (
        "select * from vault.decrypted_secrets",
        f"select pgflow_worker.set_secrets('{directory}')",
        f"select pgflow_worker._set_secrets('{directory}')",
        "insert into pgflow_worker.settings values ('secrets', '/tmp')",
        f"select pg_read_file('{directory}/key')",
    ):
        with pytest.raises(psycopg.Error) as caught:
            operator.run(statement)
        missing = (psycopg.errors.InsufficientPrivilege, psycopg.errors.UndefinedTable)
        assert isinstance(caught.value, missing), statement


def test_a_deployer_may_set_the_directory(session: Session, role: Role, directory: Path) -> None:
    deployer = role("deploy")
    deployer.run("select pgflow_worker.set_secrets(null)")
    deployer.run("select pgflow_worker.set_secrets(%s)", str(directory))
    assert deployer.deploy(FLOW)[0][1] == "compiled"


# Where they are not shown


@pytest.mark.parametrize("decorator", ["@flow.step", "@flow.step(thread=True)"])
def test_errors_tracebacks_and_logs_hide_them(
    session: Session, directory: Path, decorator: str
) -> None:
    session.deploy(f"""
        from pgflow_worker import secret
        flow = Flow("f", secrets=["key"], max_attempts=1)

        {decorator}
        def step(ctx: Context):
            ctx.log.warning("key=%s", secret("key"))
            try:
                raise ValueError(secret("key"))
            except ValueError as error:
                raise RuntimeError(["no", secret("key")]) from error
    """)
    session.start("f")
    session.work("f")
    assert session.value("select error_message from pgflow.step_tasks").startswith(
        "RuntimeError: ['no', '***'] ("
    )
    [(traceback, log)] = session.rows("select traceback, log from pgflow_worker.attempts")
    assert "ValueError: ***\n" in traceback
    assert log.endswith("key=***")
    assert VALUE not in everything(session)


def test_the_log_of_a_completed_attempt_hides_them(session: Session, directory: Path) -> None:
    session.deploy("""
        from pgflow_worker import secret
        flow = Flow("f", secrets=["key"])

        @flow.step
        def step(ctx: Context):
            ctx.log.warning("key=%s", secret("key"))
    """)
    session.start("f")
    session.work("f")
    assert session.value("select log from pgflow_worker.attempts").endswith("key=***")


def test_errors_of_a_handlers_sql_hide_them(session: Session, directory: Path) -> None:
    session.run("""
        create table keys (key text);
        create function refuse() returns trigger language plpgsql as $$
        begin
            raise exception 'refused: %%', new.key using detail = new.key, hint = new.key;
        end $$;
        create trigger at_once before insert on keys for each row execute function refuse();
        create table later (key text);
        create constraint trigger later after insert on later deferrable initially deferred
            for each row execute function refuse();
    """)
    session.deploy("""
        from pgflow_worker import secret
        flow = Flow("f", secrets=["key"], max_attempts=1)

        @flow.step
        def step(flow_input, tx: Transaction):
            tx.execute(f"insert into {flow_input} values ($1)", [secret("key")])
    """)
    for table in ("keys", "later"):
        session.start("f", table)
        session.work("f")
    assert [
        error.partition(" (")[0]
        for (error,) in session.rows("select error_message from pgflow.step_tasks")
    ] == ["DatabaseError: refused: ***"] * 2
    assert VALUE not in everything(session)


def test_an_error_that_ends_the_call_hides_them(session: Session, directory: Path) -> None:
    # Of the bookkeeping, after the handler: every field of it reaches the caller.
    session.deploy(FLOW)
    session.run("""
        create function refuse() returns trigger language plpgsql as $$
        begin
            if new.status = 'completed' then
                raise exception 'about %%', new.output using
                    errcode = '57P05', detail = new.output::text, hint = new.output::text;
            end if;
            return new;
        end $$;
        create trigger refuse before update on pgflow.step_tasks
            for each row execute function refuse();
    """)
    session.start("f")
    with pytest.raises(psycopg.Error) as caught:
        session.work("f")
    diag = caught.value.diag
    assert (diag.sqlstate, diag.message_primary) == ("57P05", 'about "***"')
    assert (diag.message_detail, diag.message_hint) == ('"***"', '"***"')
    assert VALUE not in everything(session)


def test_a_result_that_is_refused_hides_them(session: Session, directory: Path) -> None:
    session.deploy(FLOW)
    session.run("""
        create function refuse() returns trigger language plpgsql as $$
        begin
            if new.status = 'completed' then
                raise exception 'about %%', new.output;
            end if;
            return new;
        end $$;
        create trigger refuse before update on pgflow.step_tasks
            for each row execute function refuse();
    """)
    session.start("f")
    session.work("f")
    assert session.value("select error_message from pgflow.step_tasks") == (
        'result of step "step": about "***"'
    )
    assert VALUE not in everything(session)


def test_the_next_call_shows_what_is_no_secret_of_its_own(
    session: Session, directory: Path
) -> None:
    session.deploy(FLOW)
    session.start("f")
    session.work("f")
    session.deploy(
        f"""
        flow = Flow("g")

        @flow.step
        def step(ctx: Context):
            ctx.log.warning("{VALUE}")
        """,
        module="other_module",
    )
    session.start("g")
    session.work("g")
    assert session.value("select log from pgflow_worker.attempts where flow_slug = 'g'").endswith(
        VALUE
    )


def test_a_replayed_handler_gets_them_and_its_texts_hide_them(
    session: Session, directory: Path
) -> None:
    session.deploy("""
        from pgflow_worker import secret
        flow = Flow("f", secrets=["key"], max_attempts=1)

        @flow.step
        def step(flow_input, ctx: Context):
            ctx.log.info("using %s", secret("key"))
            if flow_input["fail"]:
                raise ValueError("no good: " + secret("key"))
            return len(secret("key"))
    """)
    replay = "select output, error, traceback, log from pgflow_worker.replay_task(%s, 'step')"
    [good] = session.rows(replay, session.start("f", {"fail": False}))
    assert good[0] == len(VALUE)
    [bad] = session.rows(replay, session.start("f", {"fail": True}))
    assert bad[1].startswith("ValueError: no good: *** (")
    assert "using ***" in bad[3]
    assert VALUE not in str((good, bad))
