"""Real text: some hundred articles of Wikipedia that gensim ships for its own tests, as bytes.

gensim only brings the file; it is not imported. `pip install 'tttc[examples]'` brings gensim.
"""

from __future__ import annotations

import bz2
import hashlib
import html
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO, NamedTuple
from xml.etree.ElementTree import iterparse

import torch
from torch import Tensor

DUMP = "test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
HELD_OUT = 0.1  # of the articles
SHORTEST = 1000  # bytes; what is shorter is a redirect or a stub

# Markup that says nothing to a reader, and what stays of the rest; innermost first, until nothing changes.
_ELEMENTS = "ref|math|gallery|timeline|imagemap|source|score"
_MARKUP = [
    (re.compile(pattern, re.DOTALL | re.IGNORECASE), kept)
    for pattern, kept in (
        (r"<!--.*?-->", ""),
        (rf"<({_ELEMENTS})\b[^<>]*/>", ""),
        (rf"<({_ELEMENTS})\b[^<>]*>(?:(?!<\1\b).)*?</\1\s*>", ""),
        (r"\{\{[^{}]*\}\}", ""),
        (r"\{\{\{[^{}]*\}\}\}", ""),
        (r"\{\|(?:(?!\{\|).)*?\|\}", ""),
        (r"\[\[(?:file|image|category|[a-z]{2,3}(?:-[a-z]+)*):[^\[\]]*\]\]", ""),
        (r"\[\[(?:[^\[\]|]*\|)*([^\[\]|]*)\]\]", r"\1"),
        (r"\[(?:https?|ftp):[^\s\]]*\s*([^\[\]]*)\]", r"\1"),
        (r"</?[a-z][^<>]*>", ""),
        (r"'{2,5}", ""),
    )
]
_LAYOUT = [
    (re.compile(pattern, re.MULTILINE), kept)
    for pattern, kept in (
        (r"__[A-Z]+__", ""),
        (r"\(\s*[,;:]?\s*\)", ""),  # where a template stood alone
        (r"\xa0", " "),
        (r"[ \t]+([,.;:)\n])", r"\1"),
        (r"[ \t]{2,}", " "),
        (r"^[ \t*#:;|!]+", ""),
        (r"\n{3,}", "\n\n"),
    )
]


class Article(NamedTuple):
    """What a reader sees of a page."""

    title: str
    text: str


@dataclass(frozen=True)
class Text:
    """Bytes, int64: those of the articles to train on, one after the other, and each article held out."""

    train: Tensor
    held_out: list[Tensor]

    def batch(self, size: int, length: int, generator: torch.Generator) -> Tensor:
        """Windows [size, length] of the text to train on."""
        starts = torch.randint(len(self.train) - length + 1, (size,), generator=generator)
        return self.train[starts[:, None] + torch.arange(length)]

    def windows(self, count: int, length: int) -> Tensor:
        """At most so many windows [count, length], each inside one article held out, spread evenly over them.

        Raises:
            ValueError: no article is that long.
        """
        found = [piece for a in self.held_out if len(a) >= length for piece in a.unfold(0, length, length)]
        if not found:
            longest = max(map(len, self.held_out), default=0)
            raise ValueError(f"no article held out has {length} bytes; the longest has {longest}.\n  Ask for fewer.")
        return torch.stack([found[i * len(found) // count] for i in range(min(count, len(found)))])


def read_text(dump: Path | None = None) -> Text:
    """The articles of a dump (.xml.bz2), by default the one in gensim. An article is held out by a hash of its title.

    Raises:
        ModuleNotFoundError: there is no gensim; the message says what to install.
        ValueError: there is no article to train on.
    """
    train: list[Tensor] = []
    held_out: list[Tensor] = []
    dump = dump or _shipped()
    with bz2.open(dump) as file:
        for article in articles(file):
            data = torch.tensor(list(f"{article.title}\n\n{article.text}\n\n".encode()))
            chance = int.from_bytes(hashlib.sha256(article.title.encode()).digest()[:4]) / 2**32
            (held_out if chance < HELD_OUT else train).append(data)
    if not train:
        raise ValueError(f"no article to train on in {dump}.\n  Give a MediaWiki export (.xml.bz2) with more pages.")
    return Text(torch.cat(train), held_out)


def articles(dump: IO[bytes]) -> Iterator[Article]:
    """The pages of a MediaWiki export that are articles, without markup."""
    for _, page in iterparse(dump):
        if not page.tag.endswith("}page"):
            continue
        title, namespace, markup = (page.findtext(f".//{{*}}{name}") or "" for name in ("title", "ns", "text"))
        page.clear()
        text = plain(markup)
        if namespace == "0" and len(text.encode()) >= SHORTEST:
            yield Article(title, text)


def plain(markup: str) -> str:
    """The text of a page in wiki markup.

    Example:
        plain("'''Albedo''' is a [[ratio|fraction]]{{citation needed}} of [[light]].<ref>A book.</ref>")
        # "Albedo is a fraction of light."
    """
    text = html.unescape(markup)
    before = None
    while text != before:
        before = text
        for pattern, kept in _MARKUP:
            text = pattern.sub(kept, text)
    for pattern, kept in _LAYOUT:
        text = pattern.sub(kept, text)
    return text.strip()


def _shipped() -> Path:
    found = find_spec("gensim")
    if found is None or found.origin is None:
        raise ModuleNotFoundError(
            "the text of Wikipedia comes with gensim, which is not installed.\n"
            "  pip install 'tttc[examples]', or pass a dump (.xml.bz2) of your own."
        )
    return Path(found.origin).parent / DUMP
