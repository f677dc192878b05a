"""The byte-level language models of `tttc.training` and the example on top of them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from examples import train_bytes
from tttc.errors import NonFinite
from tttc.examples.demo.training import (
    ByteModel,
    Corpus,
    Curve,
    CurvePoint,
    Size,
    bigram_bits_per_byte,
    matched_widths,
    read_corpus,
    train,
)
from tttc.library import TTTMLP, LinearAttention, TTTLinear

TINY = Size(hidden=16, heads=2, layers=1, feed_forward=8, tokens=24, batch=2)
VARIANTS = (TTTLinear, TTTMLP, LinearAttention)


@pytest.fixture
def corpus() -> Corpus:
    """A stream that repeats the bytes 0, 1, ..., 9."""
    stream = torch.arange(2000) % 10
    return Corpus(stream, stream[: 3 * 25].view(3, 25))


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """Forty little modules, and files that must not be read."""
    for i in range(40):
        (tmp_path / f"module_{i}.py").write_text(f"value_{i} = {i}\n" * 20)
    for skipped in ("test/huge.py", "site-packages/other.py", "encodings/table.py"):
        file = tmp_path / skipped
        file.parent.mkdir()
        file.write_text("~" * 10_000)
    (tmp_path / "data.txt").write_text("~" * 10_000)
    return tmp_path


def test_the_corpus_is_split_by_file(library: Path):
    corpus = read_corpus(library, tokens=24, windows=5)
    assert corpus.validation.shape == (5, 25)
    everything = torch.cat([corpus.train, corpus.validation.flatten()])
    assert ord("~") not in everything
    assert everything.dtype == torch.int64
    whole = sum(path.stat().st_size for path in library.glob("*.py"))
    assert 0 < whole - len(corpus.train) < 0.5 * whole


def test_a_new_file_moves_no_other_between_training_and_validation(library: Path):
    before = read_corpus(library, tokens=24, windows=5)
    added = "# the last in the order\n"
    (library / "zzz.py").write_text(added)  # for training, by its hash
    after = read_corpus(library, tokens=24, windows=5)
    assert torch.equal(after.validation, before.validation)
    assert torch.equal(after.train, torch.cat([before.train, torch.tensor(list(added.encode()))]))


def test_too_little_text_says_what_to_do(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"0 bytes of training text.*\n.*read_corpus\(root\)"):
        read_corpus(tmp_path)


def test_the_running_python_has_a_library_to_read():
    corpus = read_corpus()
    assert len(corpus.train) > 1_000_000
    assert corpus.validation.shape == (64, Size.tokens + 1)
    # English words and indentation: a byte is far from 8 bits, and pairs alone do not predict it well.
    assert 3.0 < bigram_bits_per_byte(corpus) < 4.5


def test_bigram_by_hand():
    # After 0 comes 1 three times and 2 once; after 1 always 0; after 2 never anything.
    corpus = Corpus(torch.tensor([0, 1, 0, 1, 0, 1, 0, 2]), torch.tensor([[0, 1, 0, 2, 2]]))
    k = 0.5
    chances = [(3 + k) / (4 + 256 * k), (3 + k) / (3 + 256 * k), (1 + k) / (4 + 256 * k), k / (256 * k)]
    expected = -sum(map(math.log2, chances)) / 4
    assert bigram_bits_per_byte(corpus, k) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("size", [Size(), TINY])
def test_the_models_are_of_equal_size(size: Size):
    widths = matched_widths(VARIANTS, size)
    with torch.device("meta"):
        models = [ByteModel(v, size, w) for v, w in zip(VARIANTS, widths, strict=True)]
    counts = [sum(p.numel() for p in model.parameters()) for model in models]
    assert min(widths) == size.feed_forward
    # Half a unit of width each way is less than 2 % at the default size; the tiny one only has to be close.
    assert max(counts) <= min(counts) * (1.02 if size == Size() else 1.05)


def test_a_model_predicts_from_what_came_before_alone():
    torch.manual_seed(0)
    model = ByteModel(TTTLinear, TINY, 8)
    tokens = torch.arange(24)[None]
    other = tokens.clone()
    other[0, 15:] = 255
    with torch.no_grad():
        assert torch.equal(model(tokens)[:, :15], model(other)[:, :15])


def test_training_learns_and_repeats(corpus: Corpus):
    first, again = (
        train(VARIANTS, steps=30, seed=3, progress=False, corpus=corpus, size=TINY, validations=4) for _ in range(2)
    )
    assert [c.name for c in first] == ["TTTLinear", "TTTMLP", "LinearAttention"]
    for a, b in zip(first, again, strict=True):
        assert a.train == b.train
        assert a.validation == b.validation
        assert a.steps == len(a.train) == a.train[-1].step == a.validation[-1].step == 30
        assert [p.step for p in a.validation] == [0, 8, 15, 22, 30]
        assert a.validation[0].bits_per_byte > 7.0  # near log2(256): nothing is known yet
        assert a.bits_per_byte < 5.0  # ten bytes in a row are quickly told from 256
        assert a.seconds > 0
        assert a.tokens_per_second == pytest.approx(30 * 2 * 24 / a.seconds)
    other = train(VARIANTS[:1], steps=30, seed=4, progress=False, corpus=corpus, size=TINY, validations=4)
    assert other[0].train != first[0].train


def test_a_limit_in_seconds_lowers_the_steps_of_all_alike(corpus: Corpus):
    linear, mlp = train([TTTLinear, TTTMLP], 10**6, 1.0, progress=False, corpus=corpus, size=TINY)
    assert 0 < linear.steps == mlp.steps < 10**4
    (short,) = train([TTTLinear], 3, 60.0, progress=False, corpus=corpus, size=TINY)
    assert short.steps == 3


def test_training_leaves_the_callers_random_numbers_and_threads_alone(corpus: Corpus):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    threads = torch.get_num_threads()
    train([LinearAttention], steps=1, progress=False, corpus=corpus, size=TINY)
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_num_threads() == threads


def test_a_diverging_training_is_refused(corpus: Corpus):
    with pytest.raises(NonFinite, match=r"diverged.*\n  Lower the learning rate, here"):
        train([LinearAttention], steps=20, progress=False, corpus=corpus, size=TINY, learning_rate=1e30)


def test_progress_names_the_variant_and_the_loss(corpus: Corpus, capsys: pytest.CaptureFixture[str]):
    train([LinearAttention], steps=2, corpus=corpus, size=TINY)
    shown = capsys.readouterr().out
    assert "LinearAttention" in shown
    assert "2/2" in shown
    assert "bits/byte" in shown


# ---- the example ----


def _curve(name: str, bits: float) -> Curve:
    points = [CurvePoint(0, 8.0), CurvePoint(10, bits)]
    return Curve(name, 1000, 10, points[1:], points, seconds=1.0, tokens_per_second=5.0)


def _run_with(monkeypatch: pytest.MonkeyPatch, out: Path, mlp: float):
    curves = [_curve("TTTLinear", 2.5), _curve("TTTMLP", mlp), _curve("LinearAttention", 9.0)]
    monkeypatch.setattr(train_bytes, "train", lambda **options: curves)
    return CliRunner().invoke(train_bytes.app, ["--steps", "7", "--out", str(out)])


def test_the_example_prints_and_plots(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    result = _run_with(monkeypatch, tmp_path / "curves.png", mlp=2.6)
    assert result.exit_code == 0, result.output
    assert "2.600" in result.output
    assert "bigram" in result.output
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_example_fails_where_a_variant_does_not_learn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    result = _run_with(monkeypatch, tmp_path / "curves.png", mlp=7.0)
    assert isinstance(result.exception, AssertionError)
    assert "TTTMLP did not beat the bigram model" in str(result.exception)


@pytest.mark.slow
def test_the_variants_beat_a_bigram_model():
    corpus = read_corpus()
    for curve in train((TTTLinear, TTTMLP), progress=False, corpus=corpus, steps=250):
        assert curve.bits_per_byte < bigram_bits_per_byte(corpus) - 0.1, curve
