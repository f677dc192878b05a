"""The example that trains a whole network that learns: its data, its story, and two processes that share it."""

from __future__ import annotations

import bz2
import math
import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from typer.testing import CliRunner

from benchmarks import end_to_end as benchmark
from benchmarks.contenders import Disagreement
from tttc.examples import end_to_end
from tttc.examples.networks import samples, training, wikipedia
from tttc.examples.networks.curves import LEARNING, PLAIN, Curves, eighths, in_characters, verdicts
from tttc.examples.networks.cycles import UNIFORM, VOCABULARY, cycles, floor
from tttc.examples.networks.training import Recipe, Trainer, outer_rate
from tttc.examples.networks.wikipedia import plain, read_text
from tttc.models import e2e, inner_rate
from tttc.terminal import plain as plain_text

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


# ---- the story ----

TINY = e2e.small(width=16, heads=2, ffn=16, prime=16, window=8, chunk=8)
RECIPE = Recipe(steps=2, length=20, batch=4, held_out=2)


def run(monkeypatch: pytest.MonkeyPatch, *options: object) -> str:
    """What the example prints, with tiny networks."""
    monkeypatch.setattr(end_to_end, "CYCLES", (TINY, RECIPE))
    monkeypatch.setattr(end_to_end, "TEXT", (replace(TINY, vocab=256), RECIPE))
    result = CliRunner().invoke(end_to_end.app, [*map(str, options)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_the_story_says_what_each_network_loses_where(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    said = run(monkeypatch, "--seeds", 2, "--report", tmp_path / "cycles.html")
    for seed in (0, 1):
        for name in (LEARNING, PLAIN):
            assert f"{name}, seed {seed}: 2 steps in" in said
        assert f"  seed {seed}, in the last eighth: learns 4." in said
    assert "random cycles, 80 tokens, 4 times the training length, nats per token:" in said
    assert "of a round of 64 are right" in said
    page = (tmp_path / "cycles.html").read_text()
    assert "<svg" in page
    assert "without learning" in page


def test_the_story_reads_text_and_keeps_to_its_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(training, "read_text", lambda: read_text(dump(tmp_path / "dump.xml.bz2")))
    monkeypatch.setattr(samples, "READ", 30)
    monkeypatch.setattr(samples, "WRITTEN", 5)
    said = run(monkeypatch, "--text", "--minutes", 1e-6, "--report", tmp_path / "text.png")
    assert f"{LEARNING}, seed 0: 1 steps in" in said
    assert "Wikipedia, 80 tokens, 4 times the training length, bits per byte:" in said
    assert "┃" in said
    assert (tmp_path / "text.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("learn", [True, False])
def test_training_lowers_the_loss_and_repeats(learn: bool) -> None:
    """Of sequences that are all the same walk."""
    walk = cycles(1, 17, torch.Generator().manual_seed(0), noise=0.0).expand(2, -1)
    task = replace(training.random_cycles(), batch=lambda size, length, generator: walk)
    found = []
    for steps in (12, 2):
        torch.manual_seed(0)
        trainer = Trainer(e2e.build(TINY, learn), task, replace(RECIPE, steps=12, learning_rate=1e-2), seed=0)
        found.append([trainer.step(i) for i in range(steps)])
    assert found[0][:2] == found[1]
    assert found[0][0] == pytest.approx(UNIFORM, abs=0.7)
    assert found[0][-1] < 0.75 * found[0][0]


def test_the_rates_rise_and_one_of_them_falls() -> None:
    rates = [inner_rate(i, 100) for i in range(100)]
    assert rates[0] == 0.1
    assert rates[5] == pytest.approx(0.55)
    assert rates[10:] == [1.0] * 90
    assert inner_rate(0, 100, warmup=0.0) == 1.0
    outer = [outer_rate(i, 100) for i in range(100)]
    assert max(outer) == outer[9] == pytest.approx(0.98, abs=0.01)
    assert outer[0] == pytest.approx(0.1)
    assert outer[-1] == pytest.approx(0.1, abs=0.01)


def test_the_trainer_hands_the_rates_on() -> None:
    trainer = Trainer(e2e.build(TINY), training.random_cycles(), replace(RECIPE, steps=100), seed=0)
    called, seen = trainer.called, []
    trainer.called = lambda tokens, rate: seen.append((tuple(tokens.shape), rate)) or called(tokens, rate=rate)
    trainer.step(5)
    assert seen == [((4, 21), inner_rate(5, 100))]
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(3e-3 * outer_rate(5, 100))


def test_what_is_said_of_losses_by_position() -> None:
    """Of two seeds that lose 2 and 4, without learning one more, and 10 more inside the window."""
    curves = Curves("walks", "nats", window=4, trained=8)
    for more in (0.0, 2.0):
        for name, base in ((LEARNING, 2.0), (PLAIN, 3.0)):
            loss = torch.full((16,), base + more)
            loss[:4] += 10.0
            curves.add(name, {8: loss[:8], 16: loss})
    assert curves.beyond(16, LEARNING) == [2.0, 4.0]
    assert verdicts(curves) == [
        "walks, 16 tokens, 2 times the training length, nats:",
        "  seed 0, beyond the window of 4: learns 2.0000, without learning 3.0000",
        "  seed 1, beyond the window of 4: learns 4.0000, without learning 5.0000",
        "  seed 0, in the last eighth: learns 2.0000, without learning 3.0000",
        "  seed 1, in the last eighth: learns 4.0000, without learning 5.0000",
    ]
    row = plain_text(eighths(curves)).splitlines()[3]
    assert row.split() == ["16", "learns", *["13.000"] * 2, *["3.000"] * 6]
    drawn = in_characters(curves, rows=4, width=12).splitlines()
    assert drawn[0] == "● learns and ○ without learning, nats, from 3.000 to 14.000"
    assert drawn[1:3] == ["     0–3                ●○  13.000  14.000", "     4–7      ●○            3.000  4.000"]


# ---- two processes ----


def losses(rank: int, ranks: int, port: int, results: str) -> None:
    """Three steps of one of so many processes, each on its part of the same four walks."""
    torch.set_num_threads(1)
    if ranks > 1:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), **address}
    walks = cycles(4, 21, torch.Generator().manual_seed(0)).tensor_split(ranks)[rank]
    task = replace(training.random_cycles(), batch=lambda size, length, generator: walks)
    with training.processes() as first:
        assert first == (rank == 0)
        torch.manual_seed(rank)  # the copies are made alike
        trainer = Trainer(e2e.build(TINY, dtype=torch.float64), task, RECIPE, seed=0)
        torch.save([trainer.step(i) for i in range(3)], f"{results}{ranks}.{rank}")


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch has no gloo here, which connects processes")
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    results = str(tmp_path / "losses")
    losses(0, 1, 0, results)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(losses, (2, port, results), nprocs=2)
    halves = [torch.load(f"{results}2.{rank}") for rank in range(2)]
    means = [sum(x) / 2 for x in zip(*halves, strict=True)]
    assert means == pytest.approx(torch.load(f"{results}1.0"), rel=1e-9)
    assert halves[0] != halves[1]


# ---- the benchmark ----


def test_the_benchmark_compares_before_it_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    assert max(benchmark.check().values()) <= 1e-12
    monkeypatch.setattr(benchmark, "EXACT", 0.0)
    with pytest.raises(Disagreement, match="the sweep's gradient is off by"):
        benchmark.check()


def test_the_benchmark_measures_steps_and_decoding(capsys: pytest.CaptureFixture[str]) -> None:
    names = (benchmark.LEARNING, benchmark.PLAIN)
    grown = {"tokens": 20, "MiB": {n: benchmark.growth(TINY, n == LEARNING, 20) for n in names}, "ratio": 1.0}
    decoded = benchmark.decoding(TINY, 3, (16, 32))
    assert decoded["state_bytes"]["16"] == decoded["state_bytes"]["32"] > 0
    benchmark.show([{"network": "tiny", "step": benchmark.times(TINY, 3, 20), "memory": [grown], "decoding": decoded}])
    assert len(capsys.readouterr().out.splitlines()) == 9
