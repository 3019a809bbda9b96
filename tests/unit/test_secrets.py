"""Secrets: who gets them, from which files, and where they are not shown."""

import json
import logging
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pgflow_worker import Context, Fail, Flow, secret, secrets
from pgflow_worker.errors import DatabaseError, FlowError, SecretUnavailable
from pgflow_worker.log import MAX_CHARACTERS, attempt_logger
from pgflow_worker.log import text_of as log_text
from pgflow_worker.report import Report
from pgflow_worker.testing import run_flow
from pgflow_worker.tracebacks import format_traceback, hiding, printable
from tests.unit.fakes import Answer, FakeDatabase

VALUE = "sk-abc/123"
NO_VAULT: Answer = [{"trusted": None}]
A_VAULT: Answer = [{"trusted": True}]


@pytest.fixture(autouse=True)
def nothing_hidden() -> Iterator[None]:
    with hiding():
        yield


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "secrets"
    path.mkdir(0o700)
    file = path / "key"
    file.write_text(VALUE + "\n")
    file.chmod(0o600)
    return path


def with_files(directory: Path | None) -> FakeDatabase:
    settings = [] if directory is None else [{"name": "secrets", "value": str(directory)}]
    return FakeDatabase({"as trusted": NO_VAULT, "pgflow_worker.settings": settings})


def with_vault(answer: Answer) -> FakeDatabase:
    return FakeDatabase({"as trusted": A_VAULT, "from vault.decrypted_secrets": answer})


def refusal(database: FakeDatabase) -> SecretUnavailable:
    with pytest.raises(SecretUnavailable) as caught:
        secrets.read(database, "f", ["key"])
    assert str(caught.value).startswith('flow "f" needs secret "key", ')
    return caught.value


# The flow's declaration


def test_a_flow_declares_names() -> None:
    assert Flow("f").secrets == ()
    assert Flow("f", secrets=["a", "_b2", "a"]).secrets == ("a", "_b2")
    assert Flow("f", secrets=["a" * 128]).secrets == ("a" * 128,)


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ("key", "secrets must be a list of names, not 'key'"),
        ([1], "a secret's name must be text, not 1"),
        (["a-b"], '"a-b" is not a name for a secret'),
        (["../key"], '"../key" is not a name for a secret'),
        (["key\n"], '"key\n" is not a name for a secret'),
        ([""], '"" is not a name for a secret'),
        (["a" * 129], f'secret "{"a" * 40}..." has 129 characters, the limit is 128'),
    ],
)
def test_other_names_are_refused(declared: Any, message: str) -> None:
    with pytest.raises(FlowError) as caught:
        Flow("f", secrets=declared)
    assert str(caught.value).startswith('flow "f": ')
    assert str(caught.value).endswith(message)


# secret()


def test_only_the_running_flows_own_are_given() -> None:
    with secrets.given("f", {"key": VALUE}):
        assert secret("key") == VALUE
        with pytest.raises(LookupError) as caught:
            secret("other")
    assert str(caught.value) == (
        'flow "f" does not declare secret "other": write Flow("f", secrets=["other"])'
    )


def test_a_flow_inside_another_gets_its_own() -> None:
    with secrets.given("outer", {"key": "outer's"}):
        with secrets.given("inner", {"key": "inner's"}):
            assert secret("key") == "inner's"
        assert secret("key") == "outer's"


def test_while_no_handler_runs_there_are_none() -> None:
    with secrets.given("f", {"key": VALUE}):
        pass
    with pytest.raises(RuntimeError, match='secret "key" was asked for while no'):
        secret("key")


# Files


@pytest.mark.parametrize(
    ("content", "value"),
    [
        ("one\n", "one"),
        ("one", "one"),
        ("one\n\n", "one\n"),
        (" ä \r\n", " ä \r"),
    ],
)
def test_a_file_is_read_without_its_trailing_newline(
    directory: Path, content: str, value: str
) -> None:
    (directory / "key").write_bytes(content.encode())
    assert secrets.read(with_files(directory), "f", ["key"]) == {"key": value}


@pytest.mark.parametrize("mode", [0o600, 0o400])
def test_modes_that_are_taken(directory: Path, mode: int) -> None:
    (directory / "key").chmod(mode)
    assert secrets.read(with_files(directory), "f", ["key"]) == {"key": VALUE}


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o700, 0o644])
def test_modes_that_are_refused(directory: Path, mode: int) -> None:
    (directory / "key").chmod(mode)
    error = refusal(with_files(directory))
    assert str(error).endswith(f'file "{directory}/key" has mode {mode:04o}, not 0600 or 0400')
    assert error.hint == f"As root: chmod 600 {directory}/key"


@pytest.mark.parametrize(
    ("owner", "mode", "problem"),
    [
        (0, 0o640, None),
        (0, 0o444, None),
        (0, 0o660, "can be written by others (mode 0660)"),
        (4711, 0o600, "belongs to another user than the server's and root"),
    ],
)
def test_files_of_other_owners(
    directory: Path, monkeypatch: pytest.MonkeyPatch, owner: int, mode: int, problem: str | None
) -> None:
    status = os.stat(directory / "key")
    fields = [0o100000 | mode, *status[1:4], owner, *status[5:]]
    monkeypatch.setattr(os, "geteuid", lambda: 26)
    assert secrets._problem(os.stat_result(fields))[0] == problem


def test_what_is_no_file_is_refused(directory: Path) -> None:
    file = directory / "key"
    file.rename(directory / "elsewhere")
    file.symlink_to(directory / "elsewhere")
    assert str(refusal(with_files(directory))).endswith("is a link")
    file.unlink()
    os.mkfifo(file, 0o600)
    assert str(refusal(with_files(directory))).endswith("is no regular file")
    file.unlink()
    file.mkdir(0o600)
    assert str(refusal(with_files(directory))).endswith("is no regular file")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is empty"),
        (b"\n", "is empty"),
        (b"\xff\xfe", "is not UTF-8"),
        (b"x" * 65_537, "has more than 65,536 bytes"),
    ],
)
def test_contents_that_are_refused(directory: Path, content: bytes, problem: str) -> None:
    (directory / "key").write_bytes(content)
    assert str(refusal(with_files(directory))).endswith(problem)


def test_a_missing_file_is_named_with_its_cure(directory: Path) -> None:
    (directory / "key").unlink()
    error = refusal(with_files(directory))
    assert str(error).endswith(f'and there is no file "{directory}/key"')
    assert (error.hint or "").startswith("As root: install -o ")


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o1777])
def test_a_directory_that_others_may_write_is_refused(directory: Path, mode: int) -> None:
    directory.chmod(mode)
    error = refusal(with_files(directory))
    assert f'"{directory}" can be written by others' in str(error)
    assert error.hint == f"Take that away: chmod go-w {directory}"


def test_without_a_directory_the_hint_makes_one(directory: Path) -> None:
    error = refusal(with_files(None))
    assert str(error).endswith("no directory of secrets is set")
    assert "select pgflow_worker.set_secrets(" in (error.hint or "")
    assert "install -o" in (error.hint or "")
    gone = directory.with_name("gone")
    assert "No such file or directory" in str(refusal(with_files(gone)))


# Vault


def test_vault_comes_first_and_is_asked_for_what_is_declared() -> None:
    database = with_vault([{"name": "key", "value": VALUE}])
    assert secrets.read(database, "f", ["key"]) == {"key": VALUE}
    assert database.executed[-1][1] == (["key"],)
    assert not any("settings" in sql for sql, _ in database.executed)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([], "and Vault has none of that name"),
        ([{"name": "key", "value": None}], "and in Vault it is empty"),
        (DatabaseError("no key", "22023"), "but Vault cannot be read: no key"),
    ],
)
def test_what_vault_lacks(answer: Answer, message: str) -> None:
    assert str(refusal(with_vault(answer))).endswith(message)


def test_an_error_of_the_servers_is_not_taken_for_vaults() -> None:
    with pytest.raises(DatabaseError) as caught:
        secrets.read(with_vault(DatabaseError("shutting down", "57P01")), "f", ["key"])
    assert caught.value.sqlstate == "57P01"


def test_a_vault_that_anybody_may_have_made_is_refused() -> None:
    database = FakeDatabase({"as trusted": [{"trusted": False}]})
    assert str(refusal(database)).endswith("but Vault is not a superuser's")
    assert len(database.executed) == 1


# What texts show


PEM = "-----BEGIN KEY-----\nMIIEvQIBADANBgkq\nabc=\n-----END KEY-----"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (VALUE, f"Bearer {VALUE}"),
        (VALUE, f"{VALUE}{VALUE}"),
        ('a"b\\c\n', json.dumps({"k": 'a"b\\c\n'})),
        ("a'b\"c\td", repr(["a'b\"c\td"])),
        (VALUE, "https://example.org/?key=sk-abc%2F123&x=1"),
        ("schlüssel", "k=schl%C3%BCssel"),
        ("schlüssel", json.dumps("schlüssel")),
        (PEM, "line MIIEvQIBADANBgkq of it"),
        (PEM, repr(PEM)),
        (" value ", "Bearer value."),
    ],
)
def test_forms_of_a_secret_that_are_hidden(value: str, text: str) -> None:
    with secrets.given("f", {"key": value}):
        shown = printable(text)
    assert "***" in shown
    for form in (value.strip(), *value.splitlines(), "abc", "schl", "MIIE"):
        assert len(form) < 3 or form not in shown or form not in value


def test_the_longer_secret_is_hidden_first() -> None:
    with secrets.given("f", {"short": "secret", "long": "secret-and-more"}):
        assert printable("(secret-and-more)") == "(***)"


def test_a_short_secret_is_not_hidden() -> None:
    with secrets.given("f", {"three": "abc", "four": "wxyz"}):
        assert printable("abc wxyz") == "abc ***"


def test_they_stay_hidden_until_the_call_ends() -> None:
    with hiding():
        with secrets.given("f", {"key": VALUE}):
            pass
        assert printable(VALUE) == "***"
    assert printable(VALUE) == VALUE


def test_tracebacks_hide_them() -> None:
    with secrets.given("f", {"key": VALUE}):
        try:
            try:
                raise ValueError(VALUE)
            except ValueError as error:
                raise KeyError(VALUE) from error
        except KeyError as error:
            text = format_traceback(error)
    assert VALUE not in text
    assert text.count("***") == 2


def test_no_part_of_a_secret_is_left_where_a_line_is_cut() -> None:
    logger = attempt_logger("f")
    with secrets.given("f", {"key": VALUE}):
        logger.warning("%s%s", "x" * (MAX_CHARACTERS - 40), 20 * VALUE)
    assert "sk-" not in log_text(logger)


def test_reports_hide_them() -> None:
    report = Report("completed", "f", "batch", 10, 5)
    with secrets.given("f", {"key": VALUE}):
        report.note(f"an error about {VALUE}")
        report.note(f"an error about {VALUE}")
    assert report.notes == ["an error about ***"]


# run_flow()


def flow_with(handler: Callable[..., Any], **options: Any) -> Flow:
    flow = Flow("f", secrets=["key"], max_attempts=1)
    flow.step("step", **options)(handler)
    return flow


def test_run_flow_gives_them_to_handlers_of_every_kind() -> None:
    flow = Flow("f", secrets=["key"])

    @flow.step
    def main() -> list[Any]:
        return [secret("key"), threading.current_thread() is threading.main_thread()]

    @flow.step(thread=True)
    def thread() -> list[Any]:
        return [secret("key"), threading.current_thread() is threading.main_thread()]

    @flow.step
    async def coroutine() -> list[Any]:
        return [secret("key"), threading.current_thread() is threading.main_thread()]

    run = run_flow(flow, {}, secrets={"key": VALUE})
    assert run.output == {
        "main": [VALUE, True],
        "thread": [VALUE, False],
        "coroutine": [VALUE, False],
    }


def test_run_flow_hides_them() -> None:
    def step(ctx: Context) -> None:
        ctx.log.setLevel(logging.INFO)
        ctx.log.info("with %s", secret("key"))
        raise Fail(f"no {secret('key')}")

    run = run_flow(flow_with(step), {}, secrets={"key": VALUE})
    assert run.log[0].endswith("with ***")
    assert run.error is not None
    assert run.error.startswith("no *** (")
    assert VALUE not in (run.traceback or "")


def test_run_flow_wants_those_that_are_declared_and_no_others() -> None:
    flow = Flow("f", secrets=["key"])

    @flow.step
    def step() -> None: ...

    with pytest.raises(SecretUnavailable) as caught:
        run_flow(flow, {})
    assert str(caught.value) == (
        'flow "f" needs secret "key": run_flow(..., secrets={"key": "..."})'
    )
    with pytest.raises(KeyError, match='does not declare secret "other"'):
        run_flow(flow, {}, secrets={"key": VALUE, "other": ""})
