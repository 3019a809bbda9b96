"""The command line: SQL on standard output, or what is wrong on standard error."""

import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgflow_worker.__main__ import compile_modules, main

FLOW = """\
from pgflow_worker import Flow
flow = Flow("greet")
@flow.step
def hello(flow_input):
    return "it's me"
"""

Write = Callable[[str, str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(dedent(text), encoding="utf-8")
        return path

    return write


def run(capsys: pytest.CaptureFixture[str], *arguments: Path | str) -> tuple[int, str, str]:
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def unquoted(sql: str) -> Iterator[tuple[str, str]]:
    """The modules and sources of deploy() calls, read as PostgreSQL reads them."""
    head = "select * from pgflow_worker.deploy('"
    while sql:
        assert sql.startswith(head)
        module, _, sql = sql.removeprefix(head).partition("', ")
        assert sql.startswith("$")
        tag = sql[: sql.index("$", 1) + 1]
        # The text ends at the first place where the tag is.
        source, found, sql = sql[len(tag) :].partition(tag)
        assert found
        assert sql.startswith(");\n")
        sql = sql.removeprefix(");\n")
        yield module, source


def test_a_module_as_sql(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    path = write("greetings.py", FLOW)
    assert run(capsys, "compile", path) == (
        0,
        f"select * from pgflow_worker.deploy('greetings', $python${FLOW}$python$);\n",
        "",
    )


def test_modules_that_others_import_come_first(write: Write) -> None:
    paths = [
        write("a.py", "import b\nimport d\n"),
        write("b.py", "import c\n"),
        write("c.py", ""),
        write("d.py", "from c import *\n"),
        write("e.py", FLOW),
    ]
    assert [module for module, _ in unquoted(compile_modules(paths))] == ["c", "b", "d", "a", "e"]


@pytest.mark.parametrize(
    "source",
    [
        "'quotes' and \"others\" and \\ and $1 and $$",
        "$python$",
        "$python$ $python_$ $python__$",
        "$python",
        "$python_",
        "$",
        "ä€😀",
        "no line feed at the end",
        "",
    ],
)
def test_a_source_arrives_as_it_is(write: Write, source: str) -> None:
    path = write("quoted.py", f"# {source}")
    assert list(unquoted(compile_modules([path]))) == [("quoted", f"# {source}")]


@given(st.lists(st.sampled_from(["$", "python", "$python", "_", " "])).map("".join))
def test_any_source_arrives_as_it_is(tmp_path_factory: pytest.TempPathFactory, source: str) -> None:
    path = tmp_path_factory.getbasetemp() / "any_source.py"
    path.write_text(f"#{source}")
    assert list(unquoted(compile_modules([path]))) == [("any_source", f"#{source}")]


def test_nothing_stays_imported(write: Write) -> None:
    before = set(sys.modules)
    compile_modules([write("greetings.py", FLOW)])
    assert set(sys.modules) == before


# What is wrong


def test_a_wrong_flow(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    path = write("wrong.py", FLOW.replace("hello(flow_input)", "hello(flow_imput)"))
    assert run(capsys, "compile", path) == (
        1,
        "",
        'error: flow "greet", step "hello": parameter "flow_imput" names no step of this flow\n'
        'hint: Did you mean "flow_input"?\n',
    )


def test_one_wrong_module_spoils_all(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(
        capsys, "compile", write("right.py", FLOW), write("wrong.py", "raise ValueError('x')")
    )
    assert (status, out) == (1, "")
    assert err.startswith('error: module "wrong" cannot be imported: ValueError: x\ndetail: Trace')
    assert 'File "wrong.py", line 1' in err
    assert err.endswith("hint: Mend the module and deploy it again.\n")


def test_a_syntax_error(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "compile", write("wrong.py", "def f(:\n"))
    assert (status, out) == (1, "")
    assert 'error: module "wrong" cannot be imported: SyntaxError: invalid syntax' in err


def test_a_missing_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "compile", tmp_path / "missing.py")
    assert (status, out) == (1, "")
    assert err.startswith("error: ")
    assert "missing.py" in err


def test_a_file_that_is_not_utf8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "latin.py"
    path.write_bytes(b"# \xe4\n")
    status, out, err = run(capsys, "compile", path)
    assert (status, out) == (1, "")
    assert "utf-8" in err


@pytest.mark.parametrize("name", ["my-flow.py", "it's.py", "1st.py", "json.py"])
def test_a_name_that_deploy_would_refuse(
    write: Write, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    status, out, err = run(capsys, "compile", write(name, FLOW))
    assert (status, out) == (1, "")
    assert name.removesuffix(".py") in err


def test_two_files_of_one_name(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(
        capsys, "compile", write("a/flows.py", FLOW), write("b/flows.py", "other = 1")
    )
    assert (status, out) == (1, "")
    assert "flows" in err


def test_what_a_module_prints_is_not_in_the_sql(
    write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, _ = run(capsys, "compile", write("chatty.py", f"print('loading')\n{FLOW}"))
    assert status == 0
    assert [module for module, _ in unquoted(out)] == ["chatty"]


@pytest.mark.parametrize("arguments", [[], ["compile"], ["deploy", "x.py"]])
def test_a_wrong_call_shows_the_usage(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: python -m pgflow_worker" in capsys.readouterr().err


def test_help_says_what_it_prints(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["compile", "--help"])
    assert not caught.value.code
    assert "prints the SQL that deploys them" in " ".join(capsys.readouterr().out.split())


def test_python_m(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["pgflow_worker", "compile", str(write("wrong.py", "1 / 0"))])
    monkeypatch.delitem(sys.modules, "pgflow_worker.__main__")
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("pgflow_worker", run_name="__main__")
    assert caught.value.code == 1
