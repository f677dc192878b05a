"""The command line: what each command prints, its exit codes, and what it says when something is wrong."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner, Result

import tttc
from tttc.backends import nvidia
from tttc.cli import doctor
from tttc.cli import main as cli
from tttc.cli.loading import LoadError, full_dims, library_variants, load_variant
from tttc.cli.main import app
from tttc.errors import TTTCError
from tttc.examples.demo import main as demo
from tttc.verification.comparison import Row, Verification

MINE = '''
import tttc

class Mine(tttc.Variant):
    """A learner of the user's own."""
    mini_batch = 4
    W = tttc.state("D", "D")

    def learner(self, x):
        return x + tttc.tanh(x @ self.W)

    def loss(self, k, v):
        return 0.5 * tttc.sum((self.learner(k) - v) ** 2)

    update = tttc.sgd(lr=tttc.gate("lr"))
'''
COMMANDS = ("list", "explain", "check", "verify", "compile", "tune", "doctor", "demo")
STAGES = ("declare", "differentiate", "simplify", "primal", "dualize", "schedule", "adjoint", "emit")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def output(*arguments: object) -> str:
    """What a command that succeeds prints on stdout."""
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def complaint(*arguments: object) -> str:
    """What a command that refuses prints on stderr."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    return result.stderr


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    return path


# -- help ------------------------------------------------------------------------------------------


def test_help_names_every_command() -> None:
    text = output("--help")
    assert all(command in text for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help_with_an_example(command: str) -> None:
    text = output(command, "--help")
    assert command == "list" or f"tttc {command}" in text.replace("Usage: tttc", "")


def test_version() -> None:
    assert output("--version").strip() == f"tttc {doctor.version()}"


def test_module_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "tttc", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"tttc {doctor.version()}\n"


def test_unknown_command_is_refused() -> None:
    assert run("explode").exit_code == 2


# -- commands --------------------------------------------------------------------------------------


def test_list_has_every_variant_with_its_first_line() -> None:
    text = output("list")
    for name, variant in library_variants().items():
        assert name in text
        assert (variant.__doc__ or "").strip().splitlines()[0] in text


def test_explain_prints_the_explanation_whole_and_unwrapped() -> None:
    layer = tttc.compile(tttc.library.TTTLinear, dims={"D": 64})
    for asked in ("--stages", "--all"):
        lines = output("explain", "ttt_linear", asked).splitlines()
        assert len(lines) >= 0.9 * len(layer.explain().splitlines())


def test_explain_is_one_page_unless_stages_are_asked_for() -> None:
    text = output("explain", "ttt_mlp")
    assert len(text.splitlines()) <= 60
    assert "stage 1 of 8" not in text
    assert text == output("explain", "ttt_mlp", "--summary")


@pytest.mark.parametrize("stage", STAGES)
def test_a_printed_stage_is_python(stage: str) -> None:
    text = output("explain", "TTTLinear", "--stage", stage)
    compile(text, stage, "exec")


def test_compile_prints_the_source_that_runs(tmp_path: Path) -> None:
    target = tmp_path / "layer.py"
    assert run("compile", "TTTLinear", "-o", target).exit_code == 0
    assert target.read_text() == output("compile", "TTTLinear")
    exec(compile(target.read_text(), "layer.py", "exec"), {})


@pytest.mark.skipif(find_spec("tvm") is None or bool(nvidia.missing()), reason="needs apache-tvm, nvcc and ptxas")
def test_compile_for_a_gpu_writes_kernels_and_says_what_they_take(tmp_path: Path) -> None:
    arguments = ("LinearAttention", "--target", "sm_90", "--backend", "tvm", "--dims", "D=16", "-o", tmp_path)
    lines = output("compile", *arguments).splitlines()
    assert lines[0].split() == [
        "kernel",
        "target",
        "registers",
        "spilled",
        "bytes",
        "shared",
        "bytes",
        "bytes",
        "outside",
        "per",
        "head",
    ]
    rows = {line.split()[0]: line.split()[1:] for line in lines[1:]}
    assert rows["linear_attention_kernel"][0] == "sm_90"
    assert int(rows["linear_attention_kernel"][1]) >= 16
    for suffix in (".cu", ".ptx", ".cubin", ".json"):
        assert (tmp_path / f"linear_attention_adjoint_kernel{suffix}").stat().st_size > 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--target", "hopper"), "there is no target 'hopper'"),
        (("--target", "sm_75", "--dtype", "bfloat16"), "sm_75 has no tensor cores for bfloat16"),
        (("--target", "sm_90", "--dtype", "int8"), "there is no dtype 'int8'"),
        (("--target", "sm_90", "--backend", "torch"), "backend 'torch' compiles for no GPU"),
    ],
)
def test_compile_for_a_gpu_refuses(arguments: tuple[str, ...], said: str) -> None:
    assert said in complaint("compile", "TTTLinear", *arguments)


def test_compile_for_a_gpu_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvidia, "missing", lambda: ["there is no ptxas"])
    assert "cannot compile for sm_80 here:\n  - there is no ptxas" in complaint(
        "compile", "RetNet", "--target", "sm_80", "--backend", "tvm"
    )


def test_explain_diff_shows_both_stages() -> None:
    lines = output("explain", "TTTLinear", "--diff", "primal", "dualize").splitlines()
    assert lines[:2] == ["--- primal", "+++ dualize"]
    assert any(line.startswith("+") for line in lines[2:])


def test_explain_latex_goes_to_a_file_or_to_stdout(tmp_path: Path) -> None:
    target = tmp_path / "layer.tex"
    assert run("explain", "TTTLinear", "--latex", target).exit_code == 0
    assert "\\" in target.read_text()
    assert output("explain", "TTTLinear", "--latex", "-") == target.read_text()


def test_dims_reach_the_compiler(mine: Path) -> None:
    assert output("explain", mine, "--dim", "D=24") != output("explain", mine, "--dim", "D=32")


def test_check_accepts_a_good_declaration(mine: Path) -> None:
    assert "Mine: nothing is wrong" in output("check", mine)


def test_check_lists_all_problems(mine: Path) -> None:
    mine.write_text(MINE.replace("mini_batch = 4", 'mini_batch = 0\n    read = "sideways"'))
    result = run("check", mine)
    assert result.exit_code == 1
    assert "1. mini_batch is 0." in result.stdout
    assert "2. read is 'sideways'." in result.stdout


def test_verify_lists_every_tensor(mine: Path) -> None:
    text = output("verify", mine, "--dim", "D=5", "--tokens", 9, "--heads", 2, "--seed", 3)
    assert all(name in text for name in ("z", "grad q", "grad k", "grad v"))
    assert "differs" not in text


def test_verify_fails_where_an_error_is_too_large(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = Row("z", error=float("nan"), tolerance=1e-12)
    monkeypatch.setattr(cli, "verify_variant", lambda *_, **__: Verification("Mine", "", (row,)))
    result = run("verify", mine)
    assert result.exit_code == 1
    assert "differs" in result.stdout


# -- what is wrong ---------------------------------------------------------------------------------


def test_a_misspelt_variant_gets_a_suggestion() -> None:
    assert "Did you mean TTTLinear" in complaint("explain", "TTTLinaer")


def test_an_unknown_stage_gets_the_list() -> None:
    assert "The stages are declare, differentiate" in complaint("explain", "TTTLinear", "--stage", "dualise")


@pytest.mark.parametrize("dim", ["D", "D=", "D=x", "D=-1", "D=0", "=4"])
def test_a_malformed_dim_is_refused(dim: str) -> None:
    assert "D=64" in complaint("explain", "TTTLinear", "--dim", dim)


def test_a_file_that_cannot_be_written_is_a_message(tmp_path: Path) -> None:
    assert "cannot write" in complaint("compile", "TTTLinear", "-o", tmp_path / "missing" / "layer.py")


def test_an_unknown_dim_is_refused() -> None:
    assert "has no dim Q" in complaint("explain", "TTTLinear", "--dim", "Q=4")


def test_a_bad_declaration_is_a_message(mine: Path) -> None:
    mine.write_text(MINE.replace("mini_batch = 4", "mini_batch = 0"))
    assert "mini_batch is 0" in complaint("explain", mine)


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TTTC_DEBUG", "1")
    assert isinstance(run("explain", "nothing").exception, TTTCError)


# -- loading ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["TTTMLP", "ttt_mlp", "ttt-mlp", "TttMlp"])
def test_library_names_in_any_spelling(name: str) -> None:
    assert load_variant(name) is tttc.library.TTTMLP


def test_a_file_by_itself_and_with_its_class(mine: Path) -> None:
    assert load_variant(str(mine)).__name__ == load_variant(f"{mine}:Mine").__name__ == "Mine"


def test_a_file_finds_the_files_beside_it(mine: Path) -> None:
    (mine.parent / "beside_mine.py").write_text("RATE = 0.5\n")
    mine.write_text(f"from beside_mine import RATE\n{MINE}")
    assert load_variant(str(mine)).__name__ == "Mine"
    assert str(mine.parent) not in sys.path


def test_a_file_of_replaced_settings_counts_what_it_names(tmp_path: Path) -> None:
    path = tmp_path / "fast.py"
    path.write_text("import tttc.library\nFast = tttc.library.TTTLinear.replace(mini_batch=4)\n")
    assert load_variant(str(path)).mini_batch == 4


def test_two_files_of_one_name_stay_apart(tmp_path: Path) -> None:
    for folder, size in (("a", 2), ("b", 8)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text(MINE.replace("mini_batch = 4", f"mini_batch = {size}"))
    loaded = [load_variant(str(tmp_path / folder / "mine.py")) for folder in ("a", "b", "a")]
    assert [variant.mini_batch for variant in loaded] == [2, 8, 2]


@pytest.mark.parametrize(
    ("text", "wanted", "said"),
    [
        ("x = 1\n", "", "It declares no variant"),
        (f"{MINE}\nclass Other(Mine):\n    mini_batch = 2\n", "", "It declares Mine, Other"),
        (MINE, ":Yours", "has no class `Yours`"),
        (f"{MINE}\nYours = 3\n", ":Yours", "`Yours` in"),
        ("def broken(:\n", "", "is not valid Python"),
        ("import no_such_module_anywhere\n", "", "needs the module `no_such_module_anywhere`"),
        ("import sys\nsys.exit(1)\n", "", '`if __name__ == "__main__":`'),
        ("x = 1 / 0\n", "", "ZeroDivisionError: division by zero"),
    ],
)
def test_what_a_file_lacks_is_said(mine: Path, text: str, wanted: str, said: str) -> None:
    mine.write_text(text)
    with pytest.raises(LoadError) as caught:
        load_variant(f"{mine}{wanted}")
    assert said in str(caught.value)


def test_an_import_error_shows_the_users_line(mine: Path) -> None:
    mine.write_text("import json\nx = json.loads('{')\n")
    with pytest.raises(LoadError, match=r"x = json\.loads") as caught:
        load_variant(str(mine))
    assert "mine.py:2" in str(caught.value)


def test_a_missing_file_suggests_its_neighbour(mine: Path) -> None:
    with pytest.raises(LoadError, match=r"Did you mean .*mine\.py"):
        load_variant(str(mine.with_name("mien.py")))


def test_dims_default_to_the_papers_ratio() -> None:
    assert full_dims(tttc.library.TTTMLP, {}) == {"D": 64, "F": 256}
    assert full_dims(tttc.library.TTTMLP, {"D": 8}) == {"D": 8, "F": 32}
    assert full_dims(tttc.library.TTTMLP, {"F": 8}) == {"D": 64, "F": 8}


# -- doctor ----------------------------------------------------------------------------------------


def test_doctor_json_has_every_group() -> None:
    result = run("doctor", "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == (0 if found["ok"] else 1)
    names = {finding["name"] for group in ("machine", "packages", "backends") for finding in found[group]}
    assert {"python", "cpu", "cache", "torch", "triton", "apache-tvm", "onnx", "onnxruntime"} <= names
    assert {finding["status"] for finding in found["packages"]} <= {"ok", "absent", "problem"}


def test_doctor_prints_remedies_whole() -> None:
    text = run("doctor").stdout
    for finding in doctor.diagnose().packages:
        assert finding.remedy in text


def test_doctor_reports_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("TTTC_CACHE_DIR", str(blocked / "cache"))
    assert "cache" in [finding.name for finding in doctor.diagnose().problems]
    assert run("doctor").exit_code == 1


def test_doctor_describes_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    card = SimpleNamespace(name="Card", total_memory=80 * 2**30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert [finding.found for finding in doctor.diagnose().machine if finding.name == "gpu 0"] == [
        "Card, 80 GiB, sm_90, CUDA 13.0"
    ]


@pytest.mark.parametrize(("build", "remedy"), [(None, "install the CUDA build"), ("13.0", "driver is new enough")])
def test_doctor_names_a_gpu_that_torch_cannot_use(
    build: str | None, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(torch.version, "cuda", build)
    problem = next(finding for finding in doctor.diagnose().problems if finding.name == "gpu")
    assert remedy in problem.remedy


def test_triton_without_its_assembler_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(doctor.importlib.metadata, "version", lambda name: "3.6.0")
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: found)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.delenv("TRITON_PTXAS_PATH", raising=False)

    def triton() -> doctor.DoctorFinding:
        return next(finding for finding in doctor.diagnose().packages if finding.name == "triton")

    assert triton().status == "problem"
    (tmp_path / "backends/nvidia/bin").mkdir(parents=True)
    (tmp_path / "backends/nvidia/bin/ptxas").touch()
    assert triton() == doctor.DoctorFinding("triton", "ok", "3.6.0, has ptxas")


def test_the_cache_is_where_the_user_wants_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TTTC_CACHE_DIR", str(tmp_path))
    assert doctor.cache_dir() == tmp_path
    monkeypatch.delenv("TTTC_CACHE_DIR")
    assert doctor.cache_dir().name == "tttc"


def test_an_installed_package_that_is_not_there_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.importlib.metadata, "version", lambda name: "1.0")
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    assert {finding.status for finding in doctor.diagnose().packages if finding.name == "onnx"} == {"problem"}


# -- demo ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_demo_writes_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = dataclasses.replace(demo.QUICK, size=(1, 32, 1), rounds=1, seconds=5.0, validations=1)
    monkeypatch.setattr(demo, "QUICK", small)
    text = output("demo", "--quick", "--out", tmp_path / "out")
    assert "class GatedLearner" in text
    page = (tmp_path / "out" / "report.html").read_text()
    assert "GatedLearner" in page


def test_demo_fails_where_the_layer_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = Row("z", error=0.5, tolerance=1e-12)
    monkeypatch.setattr(demo, "verify", lambda *_, **__: Verification("Mine", "", (row,)))
    result = run("demo", "--quick", "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "differs from its definition" in result.stderr


def test_demo_finds_out_first_whether_it_can_write(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = run("demo", "--out", tmp_path / "file" / "out")
    assert result.exit_code == 1
    assert "cannot write" in result.stderr


def test_output_into_a_closed_pipe_is_quiet() -> None:
    """As in `tttc list | head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        done = subprocess.run([sys.executable, "-m", "tttc", "list"], stdout=closed, stderr=subprocess.PIPE, text=True)
    assert "Traceback" not in done.stderr
