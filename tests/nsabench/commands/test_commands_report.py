"""`report`, and `plot` and `results` of runs that are no cells: files, exit codes, one line for bad usage."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.nsabench.present.other_runs import make_scorecard, make_training, passing, score

Call = Callable[..., Any]

NO_TORCH = """
import sys
class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "triton"):
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, NoTorch())
"""


@pytest.fixture
def card(folder: Path) -> Path:
    """A full scorecard in which all passes."""
    return make_scorecard(Path("results"))


@pytest.fixture
def training(folder: Path) -> Path:
    """A training without a flaw."""
    return make_training(Path("results"), steps=30)


@pytest.fixture
def cells(folder: Path, finished: Path) -> Path:
    """A finished run of four cells."""
    return shutil.copytree(finished, Path("results") / finished.name)


def test_go_ends_with_0_and_writes_both_files(call: Call, card: Path, training: Path) -> None:
    done = call("report", str(card), str(training))
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert lines[0] == "GO: all 2 criteria are met, and nothing limits it"
    where = Path("reports") / f"{card.name}+{training.name}"
    assert lines[-2:] == [f"report: {where}/report.html", f"report: {where}/report.md"]
    assert "<strong>GO</strong>" in (where / "report.html").read_text()
    text = (where / "report.md").read_text()
    assert f"nsabench report {card} {training}" in text
    figures = sorted(path.name for path in (where / "report-figures").iterdir())
    assert figures == [f"{training.name}-{what}.png" for what in ("gates", "loss", "needle", "speed")]
    assert all(f"](report-figures/{name})" in text for name in figures)


def test_no_go_ends_with_1_and_conditional_with_0(call: Call, folder: Path) -> None:
    bad = make_scorecard(Path("results"), [score("values", "sel:gather", status="fail", reason="off by 0.3")])
    done = call("report", str(bad), "--out", "r.md")
    assert (done.code, done.out.splitlines()[0]) == (1, "NO-GO: of 1 criterion, 1 not met")
    assert "off by 0.3" in Path("r.md").read_text()
    quick = make_scorecard(Path("results"), level="quick")
    done = call("report", str(quick), "--out", "q.html")
    assert (done.code, done.out.splitlines()[0]) == (0, "CONDITIONAL: the one criterion is met, with 1 limit")
    assert done.out.splitlines()[2].endswith("is quick: nsabench verify --full checks more")
    assert not Path("q.md").exists()


def test_a_run_of_cells_and_criteria_of_a_file(call: Call, cells: Path) -> None:
    Path("own.toml").write_text("[[criteria.max_ms]]\nS = 32\nphase = 'decode'\nms = 60_000\n")
    done = call("report", str(cells), "--criteria", "own.toml", "--out", "r.md", "--json")
    told = json.loads(done.out)
    assert (done.code, told["runs"], told["files"]) == (0, [cells.name], ["r.md"])
    (check,) = told["criteria"]
    assert (check["criterion"], check["outcome"], check["origin"]) == ("max_ms[1]", "met", "own.toml")
    assert check["wanted"] == "auto at most 60000 ms, decode fwd of the module at S=32"
    assert told["verdict"] in ("GO", "CONDITIONAL")
    assert {limit["kind"] for limit in told["limits"]} <= {"noise", "cache", "clock", "disturbed", "code"}
    Path("own.toml").write_text("[[criteria.max_ms]]\nS = 32\nphase = 'decode'\nms = 0.0001\n")
    done = call("report", str(cells), "--criteria", "own.toml", "--out", "r.md", "--json")
    assert (done.code, json.loads(done.out)["verdict"]) == (1, "NO-GO")
    Path("own.toml").write_text("[criteria]\nverify = 'pass'\n")
    done = call("report", str(cells), "--criteria", "own.toml", "--out", "r.md")
    assert done.code == 1
    assert "no scorecard was given; nsabench verify makes one" in Path("r.md").read_text()


def test_field_reports_on_demand(call: Call, training: Path) -> None:
    for asked, shown in (([], False), (["--field-reports"], True), (["--no-field-reports"], False)):
        done = call("report", str(training), "--out", "r.md", "--json", *asked)
        assert bool(json.loads(done.out)["field_reports"]) is shown
        assert ("MAE 0.152" in Path("r.md").read_text()) is shown


def test_it_needs_neither_torch_nor_the_machine(call_apart: Call, card: Path, training: Path) -> None:
    done = call_apart("report", "results", "--out", "all", before=NO_TORCH)
    assert (done.code, done.err) == (0, "")
    assert Path("all/report.html").exists()
    assert Path("all/report.md").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "nowhere is neither a run nor a folder of runs"),
        (["results", "--format", "pdf"], "--format: 'pdf' is unknown; known: html, markdown"),
        (["results", "--format", "html", "--out", "r.md"], "--format: 'html', but r.md is markdown"),
        (["results", "--out", "file"], "--out: file is a file; allowed: a folder, or a file that ends in"),
        (["results", "--out", "/dev/null/r.md"], "cannot write /dev/null/"),
        (["results", "--criteria", "none.toml"], "cannot read none.toml: No such file or directory"),
        (["results", "--criteria", "file"], "file: no [criteria] in it"),
        (["results", "--tag", "nobody"], "no run is as asked for"),
    ],
)
def test_bad_usage_is_one_line(call: Call, card: Path, arguments: list[str], said: str) -> None:
    Path("file").write_text("about = 'x'\n")
    done = call("report", *arguments)
    assert (done.code, done.out) == (2, "")
    assert said in done.err
    assert done.err.count("\n") == 1
    assert not Path("reports").exists()


def test_a_report_of_nothing_is_one_line(call_apart: Call) -> None:
    done = call_apart("report")
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert "Missing argument" in done.err


def test_results_list_every_kind_of_run(call: Call, cells: Path, card: Path, training: Path) -> None:
    hung = make_training(Path("results"), steps=4, status="hang", reason="no heartbeat for 300 s")
    done = call("results", "--format", "json")
    assert (done.code, done.err) == (0, "")
    told = {one["run_id"]: (one["kind"], one["status"], one["outcome"]) for one in json.loads(done.out)}
    assert told[cells.name] == ("cells", "ok", "4 ok")
    kind, status, outcome = told[card.name]
    assert (kind, status) == ("verify", "pass")
    assert outcome.startswith("scorecard pass: ")
    assert outcome.endswith("1 unsupported; peers: 1 fail")
    kind, status, outcome = told[training.name]
    assert (kind, status) == ("train", "ok")
    assert outcome.startswith("training ok: fp32, 30 steps, loss 5.")
    assert told[hung.name][1] == "hang"
    assert told[hung.name][2].endswith("no heartbeat for 300 s")
    table = call("results").out
    assert "outcome" in table
    assert "scorecard pass" in table
    lines = call("results", "--format", "csv").out.splitlines()
    assert (len(lines), lines[0][:27]) == (5, "run_id,path,kind,status,out")
    some = call("results", "--where", "S=32", "--format", "json")
    assert [one["run_id"] for one in json.loads(some.out)] == [cells.name]


def test_results_of_one_scorecard_and_one_training(call: Call, card: Path, training: Path) -> None:
    shown = call("results", str(card))
    assert shown.code == 0
    assert "repro: nsabench verify --full" in shown.out
    assert "smallS_equivalence" in shown.out
    rows = json.loads(call("results", str(card), "--format", "json").out)
    assert len(rows) == len(passing())
    assert rows[0]["run_id"] == card.name
    shown = call("results", str(training))
    assert (shown.code, "steps" in shown.out, "sel=off" in shown.out) == (0, True, True)
    steps = call("results", str(training), "--format", "csv").out.splitlines()
    assert len(steps) == 31
    assert call("results", str(training), "--format", "markdown").out.startswith("| run_id | step | loss |")
    refused = call("results", str(training), "--cells")
    assert (refused.code, refused.out) == (2, "")
    assert "has no cells" in refused.err


def test_plot_draws_a_training_and_no_scorecard(call: Call, card: Path, training: Path) -> None:
    refused = call("plot", str(card))
    assert (refused.code, refused.out) == (2, "")
    assert refused.err.count("\n") == 1
    assert refused.err.endswith("is a scorecard, which has no figure; nsabench report shows it\n")
    done = call("plot", "results", "--formats", "svg")
    assert done.code == 0
    assert done.err.startswith(f"nsabench: left out: {card} is a scorecard")
    names = ("loss", "speed", "gates", "needle")
    assert done.out.splitlines() == [f"plots/{training.name}/{name}.svg" for name in names]


def test_plot_draws_cells_and_trainings_apart(call: Call, cells: Path, training: Path) -> None:
    done = call("plot", str(cells), str(training), "--formats", "png", "--out", "drawn")
    assert done.code == 0
    folders = [line.split("/")[1] for line in done.out.splitlines()]
    assert dict.fromkeys(folders) == dict.fromkeys([cells.name, training.name])
