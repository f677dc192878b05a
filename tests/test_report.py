"""The HTML report: it is one file, it has all its parts, and it survives what a run may lack."""

from __future__ import annotations

import base64
import dataclasses
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

import tttc
from tttc.examples.demo import main as demo
from tttc.examples.demo.layer import GatedLearner
from tttc.examples.demo.report import (
    LIGHT,
    LossCurve,
    Report,
    StageText,
    TimingRow,
    _curve_figure,
    _timing_figure,
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
    figures=[("13/13", "tensors equal"), ("9.9×", "faster than eager")],
    formulas=[("The gradient", [r"\mathrm{d}W = k^{\top} g", r"x = \frac{1}{\sqrt{y}}"])],
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
        "<dd>9.9×</dd><dt>faster than eager</dt>",
        "<h3>The gradient</h3>",
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
    assert len(pictures) == 6
    for picture in pictures:
        assert b"<svg" in base64.b64decode(picture.partition(",")[2])


def test_a_run_without_training_or_times_has_no_pictures() -> None:
    nothing = dataclasses.replace(
        REPORT, curves=[], bigram=None, timings=[TimingRow("tttc", None, None, "failed")], formulas=[], figures=[]
    )
    bare = render(nothing)
    assert "<picture>" not in bare
    assert 'id="training"' not in bare


def test_no_curve_leaves_its_plot() -> None:
    curves = [*REPORT.curves, LossCurve("Other", 1, [0, 90], [0.0, 3.0], [8.4, 2.1])]
    for axes in _curve_figure(curves, 3.25, LIGHT).axes:
        low, high = axes.get_ylim()
        assert low < 2.1
        assert high > 8.4


def test_curves_that_lie_on_one_another_are_told_apart() -> None:
    alike = [dataclasses.replace(REPORT.curves[0], name=name) for name in "abc"]
    drawn = _curve_figure(alike, None, LIGHT).axes[0].get_lines()
    looks = {(line.get_color(), line.get_marker(), str(line.get_linestyle())) for line in drawn}
    assert len(looks) == len(drawn) == 3


def test_short_bars_are_seen_and_say_how_many_times_longer_the_others_are() -> None:
    (axes,) = _timing_figure([TimingRow("tttc", 1.0, 2.0), TimingRow("eager", 100.0, 500.0)], LIGHT).axes
    assert axes.get_xscale() == "log"
    assert [text.get_text().strip() for text in axes.texts] == ["3.00 ms", "600 ms  200.0×"]


def test_the_formulas_of_the_demo_are_drawn() -> None:
    found = demo._formulas(tttc.compile(GatedLearner, {"D": 8, "F": 16}))
    assert [title for title, _ in found] == ["The gradient of the loss", "The dual form, for each mini-batch"]
    assert r"W_{1} \leftarrow W_{1} - x_{11}^{\top} x_{7}" in found[1][1]
    page = render(dataclasses.replace(REPORT, formulas=found))
    assert page.count("<h3>") == 2


def test_a_short_training_gets_no_verdict() -> None:
    """Fewer steps than counting byte pairs would ask for: the numbers, and nothing beside them."""
    arguments = REPORT.verification, REPORT.timings, REPORT.curves
    assert "counting byte pairs gives 3.25" in demo._summary(*arguments, 3.25)[-1]
    assert demo._summary(*arguments, None)[-1] == "Bits per byte of unseen text after 100 steps: Mine 2.50."
    assert demo._figures(*arguments) == [
        ("1/2", "tensors equal the definition, gradients included"),
        ("10.0×", "faster than eager"),
        ("2.50", "bits per byte of unseen text, Mine"),
    ]


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
