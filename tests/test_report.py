"""The HTML report: it is one file, it has all its parts, and it survives what a run may lack."""

from __future__ import annotations

import base64
import dataclasses
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tttc.examples.demo.report import (
    LossCurve,
    Report,
    StageText,
    TimingRow,
    error_text,
    milliseconds,
    render,
    write_report,
)
from tttc.verification.comparison import Row

REPORT = Report(
    title="Mine: <from declaration>",
    summary=["The largest relative error is 3.0e-16."],
    facts=[("cpu", "a fast one"), ("torch", "2.13")],
    declaration="class Mine(tttc.Variant):\n    mini_batch = 16",
    stages=[StageText("declare", 0.4, "x = a < b"), StageText("dualize", 12.3, "z = tril(A) @ r")],
    verification=[Row("z", 3e-16, 1e-12), Row("grad q", 0.5, 1e-12)],
    timings=[
        TimingRow("tttc", 10.0, 20.0),
        TimingRow("eager", 100.0, 200.0),
        TimingRow("other", None, None, "needs a compiler"),
    ],
    timing_setup="Batch 1.",
    curves=[LossCurve("Mine", 1234, [0, 50, 100], [0.0, 5.0, 10.0], [8.0, 4.0, 2.5])],
    training_setup="On bytes.",
    bigram=3.25,
    reproduce=["tttc demo"],
)


class Collector(HTMLParser):
    """The tags of a page, what they refer to, and whether they nest."""

    VOID = frozenset({"meta", "img", "source", "link", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.ids: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "srcset", "href"):
                self.addresses.append(value or "")
            if name == "id":
                self.ids.add(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def parsed(page: str) -> Collector:
    collector = Collector()
    collector.feed(page)
    assert collector.open == []
    return collector


@pytest.fixture(scope="module")
def page() -> str:
    return render(REPORT)


def test_the_page_needs_nothing_but_itself(page: str) -> None:
    found = parsed(page)
    assert all(address.startswith(("#", "data:")) for address in found.addresses)
    assert {address[1:] for address in found.addresses if address.startswith("#")} <= found.ids
    assert "@import" not in page
    assert "url(" not in page


def test_every_part_is_there(page: str) -> None:
    for part in ("declaration", "stages", "verification", "timings", "training", "reproduce"):
        assert f'<section id="{part}">' in page
    for text in (
        "a fast one",
        "needs a compiler",
        "1,234",
        "3.250",
        "2.500",
        "10.0×",
        "tttc demo",
        "On bytes.",
    ):
        assert text in page


def test_text_is_escaped(page: str) -> None:
    assert "Mine: &lt;from declaration&gt;" in page
    assert "<from" not in page
    assert "a < b" not in page


def test_verdicts_follow_the_errors(page: str) -> None:
    assert re.findall(r"(equal|differs)</td>", page) == ["equal", "differs"]
    assert not Row("z", math.nan, 1.0).ok


def test_pictures_come_light_and_dark(page: str) -> None:
    pictures = [address for address in parsed(page).addresses if address.startswith("data:image/svg+xml;base64,")]
    assert len(pictures) == 4
    for picture in pictures:
        assert b"<svg" in base64.b64decode(picture.partition(",")[2])


def test_a_run_without_training_or_times_has_no_pictures() -> None:
    nothing = dataclasses.replace(REPORT, curves=[], bigram=None, timings=[TimingRow("tttc", None, None, "failed")])
    bare = render(nothing)
    assert "<picture>" not in bare
    assert 'id="training"' not in bare


def test_the_same_report_is_the_same_file(tmp_path: Path, page: str) -> None:
    path = write_report(REPORT, tmp_path / "new" / "report.html")
    assert path.read_text(encoding="utf-8") == page


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0.1234, "0.12 ms"), (12.34, "12.3 ms"), (123.4, "123 ms"), (12345.6, "12,346 ms")],
)
def test_times_have_three_digits(value: float | None, text: str) -> None:
    assert milliseconds(value) == text


def test_errors_have_two_digits() -> None:
    assert [error_text(0.0), error_text(3.04e-16)] == ["0", "3.0e-16"]
