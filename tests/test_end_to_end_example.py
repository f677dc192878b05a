"""The example that trains a whole network that learns: its data, its story, and two processes that share it."""

from __future__ import annotations

import bz2
import math
from pathlib import Path

import pytest
import torch

from tttc.examples.networks import wikipedia
from tttc.examples.networks.cycles import UNIFORM, VOCABULARY, cycles, floor
from tttc.examples.networks.wikipedia import plain, read_text

# ---- random cycles ----


def test_each_sequence_walks_a_cycle_of_its_own() -> None:
    walks = cycles(4, 3 * VOCABULARY, torch.Generator().manual_seed(0), noise=0.0)
    rounds = walks.view(4, 3, VOCABULARY)
    assert torch.equal(rounds[:, 0], rounds[:, 2])
    assert torch.equal(rounds[:, 0].sort(1).values, torch.arange(VOCABULARY).expand(4, -1))
    assert (rounds[0, 0] != rounds[1, 0]).any()


def test_who_knows_the_cycle_loses_what_the_jumps_cost() -> None:
    """Counted: after all but a tenth of the tokens comes the next one of the cycle."""
    walks = cycles(1, 200_000, torch.Generator().manual_seed(1))[0]
    pairs = torch.zeros(VOCABULARY, VOCABULARY).index_put_((walks[:-1], walks[1:]), torch.tensor(1.0), accumulate=True)
    chance = pairs / pairs.sum(1, keepdim=True)
    entropy = -(pairs * chance.clamp_min(1e-9).log()).sum() / pairs.sum()
    assert float(entropy) == pytest.approx(floor(), abs=0.02)
    assert math.log(VOCABULARY) == UNIFORM == pytest.approx(4.16, abs=0.01)


# ---- Wikipedia ----

MARKUP = """{{Infobox element|name=[[Tin]]|note={{convert|7|km}}}}<!-- a {{comment}} -->
[[File:Tin.jpg|thumb|A [[metal|soft]] metal]]
'''Tin''' is a [[chemical element|metal]]{{citation needed|date=May 2012}} (from {{lang|la|stannum}}) of
&quot;''group''&nbsp;14&quot;.<ref name="a">A book, p.&nbsp;7.</ref><ref name="b" /> See [http://tin.org the institute]
and [[bronze]]s.

{| class="wikitable"
|-
! year !! tonnes
|-
| 2006 || 321,000
|}


== Uses ==
* Solder, <small>mostly</small>
:<math>x < y</math>
[[Category:Metals]]
[[de:Zinn]]"""
TEXT = """Tin is a metal (from) of
"group 14". See the institute
and bronzes.

== Uses ==
Solder, mostly"""


def test_a_reader_of_wiki_markup_sees_its_text() -> None:
    assert plain(MARKUP) == TEXT


def dump(path: Path, count: int = 60) -> Path:
    """Pages of a MediaWiki export: `count` articles, and pages that are none."""
    page = "<page><title>{}</title><ns>{}</ns><revision><text>{}</text></revision></page>"
    pages = [page.format(f"Article {i}", 0, " ".join(f"[[word]] {i}.{j}" for j in range(120))) for i in range(count)]
    pages += [page.format("Talk:Tin", 1, "~" * 5000), page.format("TiN", 0, "#REDIRECT [[Tin]] ~")]
    space = "http://www.mediawiki.org/xml/export-0.8/"
    path.write_bytes(bz2.compress(f'<mediawiki xmlns="{space}">{"".join(pages)}</mediawiki>'.encode()))
    return path


def test_articles_are_held_out_whole_and_others_read_one_after_the_other(tmp_path: Path) -> None:
    text = read_text(dump(tmp_path / "dump.xml.bz2"))
    train = bytes(text.train.tolist()).decode()
    held_out = [bytes(a.tolist()).decode() for a in text.held_out]
    titles = [f"Article {i}\n\nword {i}.0 word {i}.1" for i in range(60)]
    kept_back = [t for t in titles if any(a.startswith(t) for a in held_out)]
    assert 1 <= len(kept_back) == len(held_out) <= 12
    assert all((t in train) != (t in kept_back) for t in titles)
    assert "~" not in train + "".join(held_out)
    more = read_text(dump(tmp_path / "more.xml.bz2", 61))  # moves none between the two
    assert torch.equal(more.train[: len(text.train)], text.train)


def test_windows_lie_inside_articles(tmp_path: Path) -> None:
    text = read_text(dump(tmp_path / "dump.xml.bz2"))
    windows = text.windows(5, 300)
    assert windows.shape == (5, 300)
    for window in windows:
        assert any(torch.equal(window, piece) for a in text.held_out for piece in a.unfold(0, 300, 300))
    assert len({tuple(w.tolist()) for w in windows}) == 5
    with pytest.raises(ValueError, match=r"no article to train on.*\n"):
        read_text(dump(tmp_path / "empty.xml.bz2", 0))
    with pytest.raises(ValueError, match=r"no article held out has 9000 bytes; the longest has \d+\.\n"):
        text.windows(5, 9000)
    batch = text.batch(3, 100, torch.Generator().manual_seed(0))
    stream = text.train.unfold(0, 100, 1)
    assert all((stream == row).all(1).any() for row in batch)


def test_without_gensim_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wikipedia, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"gensim, which is not installed.\n  pip install 'tttc\[examples\]'"):
        read_text()
