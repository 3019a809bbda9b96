"""Flows that pgflow's compiler has put into the database, and their Python counterparts."""

from collections.abc import Callable

import psycopg
import pytest

from tests.database.conftest import Session, counts

CompileFlow = Callable[[str], None]

TYPESCRIPT = """
    import { Flow } from '@pgflow/dsl';

    type Input = { title: string; words: string[] };

    export default new Flow<Input>({ slug: 'wordCount', maxAttempts: 4, baseDelay: 2, timeout: 30 })
      .array({ slug: 'findWords', timeout: 10 }, (input) => input.run.words)
      .map({ slug: 'countLetters', array: 'findWords', maxAttempts: 5 }, (word) => word.length)
      .step({ slug: 'total', dependsOn: ['countLetters'] }, (input) => 0)
      .step(
        { slug: 'saveToDb', dependsOn: ['total', 'findWords'], baseDelay: 7, startDelay: 3600 },
        (input) => ({ title: input.run.title, total: input.total }),
      );
"""

PYTHON = """
    flow = Flow("wordCount", max_attempts=4, base_delay=2, timeout=30)

    @flow.array("findWords", timeout=10)
    def find_words(flow_input):
        return flow_input["words"]

    @flow.map("countLetters", over=find_words, max_attempts=5)
    def count_letters(word):
        return len(word)

    @flow.step
    def total(count_letters):
        return sum(count_letters)

    @flow.step("saveToDb", base_delay=7, start_delay=3600)
    def save_to_db(find_words, total, flow_input):
        return {"title": flow_input["title"], "total": total}
"""


def changed(old: str, new: str) -> str:
    assert old in PYTHON
    return PYTHON.replace(old, new)


def test_the_same_flow_in_python_is_verified(session: Session, compile_flow: CompileFlow) -> None:
    compile_flow(TYPESCRIPT)
    assert session.deploy(PYTHON) == [("wordCount", "verified", [])]


def test_its_runs_are_completed(session: Session, compile_flow: CompileFlow) -> None:
    compile_flow(TYPESCRIPT)
    session.deploy(PYTHON)
    run = session.start("wordCount", {"title": "Alice", "words": ["down", "the", "rabbit-hole"]})

    report = session.work("wordCount", mode="drain")
    delayed = session.work_batch("wordCount", ignore_delay=True)

    assert (counts(report), counts(delayed)) == ({"completed": 5}, {"completed": 1})
    assert session.rows("select status, output from pgflow.runs where run_id = %s", run) == [
        ("completed", {"saveToDb": {"title": "Alice", "total": 18}})
    ]


def test_a_map_of_the_runs_input_is_verified_and_completed(
    session: Session, compile_flow: CompileFlow
) -> None:
    compile_flow("""
        import { Flow } from '@pgflow/dsl';

        export default new Flow<string[]>({ slug: 'greetAll' })
          .map({ slug: 'greetOne' }, (name) => `Hello, ${name}!`);
    """)
    deployed = session.deploy("""
        flow = Flow("greetAll")

        @flow.map("greetOne")
        def greet_one(name):
            return f"Hello, {name}!"
    """)
    session.start("greetAll", ["Ada", "Grace"])
    session.work("greetAll", mode="drain")

    assert deployed == [("greetAll", "verified", [])]
    assert session.value("select output from pgflow.runs") == {
        "greetOne": ["Hello, Ada!", "Hello, Grace!"]
    }


@pytest.mark.parametrize(
    ("source", "differences"),
    [
        pytest.param(
            changed("total(count_letters)", "total(find_words)"),
            ['step "total" depends on [findWords] in the code, on [countLetters] in the database'],
            id="another dependency",
        ),
        pytest.param(
            changed("save_to_db(find_words, total, ", "save_to_db(total, "),
            [
                'step "saveToDb" depends on [total] in the code, '
                "on [findWords, total] in the database"
            ],
            id="a dependency less",
        ),
        pytest.param(
            PYTHON[: PYTHON.index('    @flow.step("saveToDb"')],
            ['step "saveToDb" is in the database, not in the code'],
            id="a missing step",
        ),
        pytest.param(
            changed(
                '@flow.map("countLetters", over=find_words', '@flow.step("countLetters"'
            ).replace("count_letters(word)", "count_letters(find_words)"),
            ['step "countLetters" is a single step in the code, a map step in the database'],
            id="another type",
        ),
        pytest.param(
            PYTHON + "\n    @flow.step\n    def notify(total): pass\n",
            ['step "notify" is in the code, not in the database'],
            id="an extra step",
        ),
        pytest.param(
            changed('@flow.step("saveToDb", ', "@flow.step("),
            [
                'step "save_to_db" is in the code, not in the database',
                'step "saveToDb" is in the database, not in the code',
            ],
            id="another slug",
        ),
    ],
)
def test_another_structure_is_refused_and_listed(
    session: Session, compile_flow: CompileFlow, source: str, differences: list[str]
) -> None:
    compile_flow(TYPESCRIPT)
    assert session.deploy(source, dry_run=True) == [("wordCount", "mismatch", differences)]
    with pytest.raises(psycopg.Error) as caught:
        session.deploy(source)
    assert caught.value.sqlstate == "PW003"
    assert caught.value.diag.message_detail == "; ".join(differences) + "."


@pytest.mark.parametrize(
    ("source", "changes"),
    [
        pytest.param(
            changed("timeout=30)", "timeout=40)"), ["timeout: 30 -> 40"], id="of the flow"
        ),
        pytest.param(
            changed("max_attempts=5", "max_attempts=6"),
            ["countLetters.max_attempts: 5 -> 6"],
            id="of a step",
        ),
        pytest.param(
            changed(", start_delay=3600", ""), ["saveToDb.start_delay: 3600 -> 0"], id="left out"
        ),
    ],
)
def test_another_option_is_updated_and_listed(
    session: Session, compile_flow: CompileFlow, source: str, changes: list[str]
) -> None:
    compile_flow(TYPESCRIPT)
    assert session.deploy(source) == [("wordCount", "updated", changes)]
    assert session.deploy(source) == [("wordCount", "verified", [])]
