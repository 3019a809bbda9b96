"""The example flow, without a network and once with a real page from this machine."""

import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import pytest

from flows.analyze_website import NEGATIVE, POSITIVE, flow, sentiment, summary, tags
from pgflow_worker.testing import Run, run_flow

PAGE = """<!doctype html>
<html><head><title>Vacuum &amp;
  Analyze</title><style>p { color: failure }</style></head>
<body>
<nav>navigation navigation navigation</nav>
<script>var failure = "failure failure";</script>
<p>Routine vacuuming keeps tables useful and reliable for every database.</p>
<p>Vacuuming tables is easy. An error in the tables is a problem of the past.</p>
<pre>vacuum vacuum vacuum</pre>
<p>Unrelated words are here to fill a line which nobody wants in any summary.</p>
</body></html>"""

TEXT = "Good tables are useful and reliable. Bad tables fail."


def answers(sql: str, args: Sequence[object]) -> list[dict[str, Any]]:
    assert sql.startswith("insert into websites")
    return [{"url": args[0], "title": args[1]}]


class Site(BaseHTTPRequestHandler):
    """Answers every path with the status it names, and /page with the page."""

    seen: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.seen.append(self.path)
        status = 200 if self.path == "/page" else int(self.path.strip("/"))
        body = PAGE.encode("latin-1")
        self.send_response(status)
        self.send_header("Content-Type", "text/html; charset=latin-1")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None: ...


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a web server."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    Site.seen.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Site) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_the_flows_shape() -> None:
    assert {slug: (step.kind, step.dependencies) for slug, step in flow.steps.items()} == {
        "website": ("single", ()),
        "sentiment": ("single", ("website",)),
        "summary": ("single", ("website",)),
        "tags": ("array", ("website",)),
        "saveToDb": ("single", ("sentiment", "summary", "tags", "website")),
    }


def test_sentiment_counts_words() -> None:
    assert sentiment({"text": "Good, useful; BROKEN? goodness"}) == {
        "score": 0.33,
        "positive": 2,
        "negative": 1,
    }
    assert sentiment({"text": ""}) == {"score": 0.0, "positive": 0, "negative": 0}


@pytest.mark.parametrize("word", sorted(POSITIVE | NEGATIVE))
def test_every_weighed_word_counts(word: str) -> None:
    found = sentiment({"text": f"{word}."})
    assert (found["positive"], found["negative"]) == (word in POSITIVE, word in NEGATIVE)


def test_tags_are_the_most_frequent_words() -> None:
    text = "Tables and tables, rows of tables: rows above all. Six more words: one two three four"
    assert tags({"text": text})[:2] == ["tables", "rows"]
    assert len(tags({"text": text})) == 5
    assert tags({"text": ""}) == []


def test_a_text_without_sentences_is_cut() -> None:
    assert summary({"text": "Too short."}) == "Too short."
    assert summary({"text": "x" * 1000}) == "x" * 200


def test_a_summary_is_two_sentences_in_their_order() -> None:
    sentences = [
        "The vacuum of a table returns the space of its dead rows.",
        "Nobody has ever wondered why people like bananas so much.",
        "A vacuum of the table also updates the map of visible rows.",
    ]
    assert summary({"text": " ".join(sentences)}) == f"{sentences[0]} {sentences[2]}"


def test_without_a_network() -> None:
    run = run_flow(
        flow,
        {"url": "http://example.com"},
        handlers={"website": lambda **_: {"title": "Home", "text": TEXT}},
        answers=answers,
    )
    assert run.status == "completed"
    output = run.output["saveToDb"]
    assert (output["url"], output["title"]) == ("http://example.com", "Home")
    assert output["summary"] == TEXT
    assert "tables" in output["tags"]
    [saved] = run.executed
    assert saved.sql.startswith("insert into websites (url, title, sentiment, summary, tags)")
    assert saved.args == (
        "http://example.com",
        "Home",
        run.outputs["sentiment"],
        run.outputs["summary"],
        run.outputs["tags"],
    )


def test_with_a_real_page(site: str) -> None:
    run = run_flow(flow, {"url": f"{site}/page"}, answers=answers)
    assert run.status == "completed", run.traceback
    website = run.outputs["website"]
    assert website["title"] == "Vacuum & Analyze"
    assert website["text"].startswith("Routine vacuuming keeps tables useful")
    assert "failure" not in website["text"]
    assert "navigation" not in website["text"]
    assert run.outputs["tags"][:2] == ["tables", "vacuuming"]
    assert run.outputs["sentiment"] == {"score": 0.2, "positive": 3, "negative": 2}
    assert "Unrelated" not in run.outputs["summary"]
    assert [saved.args[:2] for saved in run.executed] == [(f"{site}/page", "Vacuum & Analyze")]
    assert run.log[0].endswith(f"fetched {site}/page: {len(website['text'])} characters of text")
    assert Site.seen == ["/page"]


def failed(url: str) -> Run:
    run = run_flow(flow, {"url": url}, answers=answers)
    assert (run.status, run.output, run.executed) == ("failed", {}, [])
    return run


@pytest.mark.parametrize("status", [404, 410])
def test_a_page_that_does_not_exist_is_not_tried_again(site: str, status: int) -> None:
    run = failed(f"{site}/{status}")
    assert run.attempts["website"] == 1
    assert run.error is not None
    assert run.error.startswith(f"{site}/{status} does not exist: HTTP {status} (")
    assert Site.seen == [f"/{status}"]


def test_other_answers_are_tried_again(site: str) -> None:
    run = failed(f"{site}/503")
    assert run.attempts["website"] == 3
    assert run.error is not None
    assert run.error.startswith("HTTPError: HTTP Error 503: Service Unavailable (analyze_website")
    assert Site.seen == ["/503"] * 3


def test_a_run_without_a_url() -> None:
    run = run_flow(flow, {})
    assert run.status == "failed"
    assert run.error is not None
    assert run.error.startswith("KeyError: 'url' (analyze_website.py:")
    assert run.error.endswith(", in website)")
