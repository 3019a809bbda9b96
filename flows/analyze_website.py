"""Analyze a web page: fetch it, find its sentiment, a summary and tags, save a row.

The run's input is {"url": "http://..."}. The last step fills a table that must exist:

    create table websites (
        url text primary key, title text, sentiment jsonb, summary text, tags text[],
        analyzed_at timestamptz not null default now()
    );
"""

from __future__ import annotations

import re
import urllib.error
import urllib.request
from collections import Counter
from html.parser import HTMLParser
from typing import Any

from pgflow_worker import Context, Fail, Flow, Transaction

Json = dict[str, Any]

flow = Flow("analyze_website", max_attempts=3, base_delay=1, timeout=30)

MAX_BYTES = 5_000_000


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


POSITIVE = _set(
    """advantage allow best better capable clear convenient correct easy easily effective
    efficient ensure fast flexible good great guarantee help helpful important improve
    improved powerful reliable robust safe secure simple simply success successful support
    useful valid well"""
)
NEGATIVE = _set(
    """abort bad broken cannot corrupt corruption crash damage danger dangerous delay deny
    difficult error errors expensive fail failed fails failure harmful impossible incorrect
    invalid lost loss missing obsolete problem problems refuse slow unable unexpected unsafe
    useless warning worse wrong"""
)
STOP_WORDS = _set(
    """about above after again also although always another because been before being below
    between both cannot could does each either else even every example first following from
    given have however into just like made make many might more most much must need never
    none note only other otherwise over rather same see should since some specified such than
    that their them then there these they this those though through under unless until upon
    used uses using value values very well were what when where whether which while will with
    within without would your"""
)


@flow.step
def website(flow_input: Json, ctx: Context) -> Json:
    """Fetch the page and reduce it to its title and text."""
    url = flow_input["url"]
    try:
        with urllib.request.urlopen(url, timeout=min(10.0, ctx.remaining())) as response:
            charset = response.headers.get_content_charset() or "utf-8"
            body = response.read(MAX_BYTES).decode(charset, errors="replace")
    except urllib.error.HTTPError as error:
        error.close()
        if error.code in (404, 410):
            # No later attempt can find it.
            raise Fail(f"{url} does not exist: HTTP {error.code}") from error
        raise
    page = _Page()
    page.feed(body)
    ctx.log.info("fetched %s: %d characters of text", url, len(page.text))
    return {"title": page.title, "text": page.text}


@flow.step
def sentiment(website: Json) -> Json:
    """Weigh the words with a good ring against those with a bad one: score from -1 to 1."""
    words = re.findall(r"[a-z]+", website["text"].lower())
    positive = sum(word in POSITIVE for word in words)
    negative = sum(word in NEGATIVE for word in words)
    score = round((positive - negative) / max(positive + negative, 1), 2)
    return {"score": score, "positive": positive, "negative": negative}


@flow.step
def summary(website: Json) -> str:
    """The two sentences that hold most of the page's frequent words, in their order."""
    text = website["text"]
    frequency = Counter(_words(text))
    sentences = [s for s in re.split(r"(?<=[.!?])\s+", text) if 40 <= len(s) <= 300]

    def weight(sentence: str) -> float:
        words = _words(sentence)
        return sum(frequency[word] for word in words) / (len(words) + 5)

    best = sorted(sentences, key=weight, reverse=True)[:2]
    return " ".join(sorted(best, key=sentences.index)) or text[:200]


@flow.array
def tags(website: Json) -> list[str]:
    """The page's five most frequent words."""
    return [word for word, _ in Counter(_words(website["text"])).most_common(5)]


@flow.step("saveToDb")
def save_to_db(
    flow_input: Json,
    website: Json,
    sentiment: Json,
    summary: str,
    tags: list[str],
    tx: Transaction,
) -> Json:
    """Save the row, in the transaction that also completes this task."""
    [row] = tx.execute(
        """insert into websites (url, title, sentiment, summary, tags)
        values ($1, $2, $3, $4, $5)
        on conflict (url) do update
        set title = excluded.title, sentiment = excluded.sentiment, summary = excluded.summary,
            tags = excluded.tags, analyzed_at = now()
        returning url, title""",
        [flow_input["url"], website["title"], sentiment, summary, tags],
    )
    return {**row, "sentiment": sentiment["score"], "summary": summary, "tags": tags}


def _words(text: str) -> list[str]:
    return [w for w in re.findall(r"[a-z]{4,}", text.lower()) if w not in STOP_WORDS]


class _Page(HTMLParser):
    """Collects a page's title and its running text."""

    _SILENT = frozenset(("script", "style", "head", "nav", "pre"))

    def __init__(self) -> None:
        super().__init__()
        self.title = ""
        self._pieces: list[str] = []
        self._silent: list[str] = []
        self._in_title = False

    @property
    def text(self) -> str:
        return " ".join(" ".join(self._pieces).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:  # noqa: ARG002
        if tag == "title":
            self._in_title = True
        elif tag in self._SILENT:
            self._silent.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag == "title":
            self._in_title = False
        elif tag in self._silent:
            while self._silent.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        if self._in_title:
            self.title = " ".join(f"{self.title} {data}".split())
        elif not self._silent:
            self._pieces.append(data)
