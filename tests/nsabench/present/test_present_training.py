"""Figures of a training: those it has numbers for, with axes that say what they are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
from matplotlib.figure import Figure

from nsabench.present import training_figures
from nsabench.present.frame import PresentError
from nsabench.present.training_figures import load_drawable, plot_training
from nsabench.store import StoreError
from nsabench.store.training import load_training
from tests.nsabench.present.other_runs import make_scorecard, make_training


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Figure]]:
    """The figures that were drawn, by name; nothing is written."""
    found: dict[str, Figure] = {}

    def keep(figures: dict[str, Figure], out: Path, formats: Any) -> list[Path]:
        found.update(figures)
        return []

    monkeypatch.setattr(training_figures, "save_figures", keep)
    yield found
    plt.close("all")


def labels(figure: Figure) -> set[str]:
    return {text for axes in figure.axes for text in (axes.get_xlabel(), axes.get_ylabel()) if text}


def test_every_figure_has_labels_with_units(tmp_path: Path, drawn: dict[str, Figure]) -> None:
    plot_training(load_training(make_training(tmp_path)), tmp_path)
    assert {name: labels(figure) for name, figure in drawn.items()} == {
        "loss": {"step", "loss, nats per byte"},
        "speed": {"step", "tokens/s"},
        "gates": {"step", "share of gates, %"},
        "needle": {"distance of the nearest, tokens", "accuracy, %"},
    }


def test_what_is_drawn_is_what_was_stored(tmp_path: Path, drawn: dict[str, Figure]) -> None:
    training = load_training(make_training(tmp_path, steps=60, collapsed=[(50, 1)]))
    plot_training(training, tmp_path)
    (line,) = drawn["loss"].axes[0].lines
    assert list(line.get_ydata()) == [row["loss"] for row in training.steps]
    panels = drawn["gates"].axes
    assert [axes.get_title() for axes in panels] == ["layer 0", "layer 1: collapsed where marked"]
    shares = {line.get_label(): list(line.get_ydata()) for line in panels[0].lines}
    assert list(shares) == ["compressed", "selected", "sliding"]
    first = training.gates[0]
    assert [shares[name][0] for name in shares] == pytest.approx(
        [100 * first[name] for name in ("share_cmp", "share_sel", "share_win")]
    )
    needle = {line.get_label(): list(line.get_ydata()) for line in drawn["needle"].axes[0].lines}
    assert needle["needle, auto"] == pytest.approx([100, 97, 97])
    assert needle["needle, sel=off"] == pytest.approx([100, 7, 7])
    assert not any(name.startswith("copy") for name in needle)
    assert "window, 32 tokens" in needle
    assert needle["chance 6.25 %"] == pytest.approx([6.25, 6.25])


def test_a_long_training_has_a_running_mean(tmp_path: Path, drawn: dict[str, Figure]) -> None:
    plot_training(load_training(make_training(tmp_path, steps=300)), tmp_path)
    thin, mean = drawn["loss"].axes[0].lines
    assert mean.get_label() == "mean of 6 logged steps"
    losses = list(thin.get_ydata())
    assert list(mean.get_ydata())[-1] == pytest.approx(sum(losses[-6:]) / 6)


def test_evaluations_of_several_steps_are_drawn_over_steps(tmp_path: Path, drawn: dict[str, Figure]) -> None:
    training = load_training(make_training(tmp_path, steps=20))
    training.evaluation.extend({**row, "step": 10, "accuracy": 0.5} for row in list(training.evaluation))
    plot_training(training, tmp_path)
    axes = drawn["needle"].axes[0]
    assert axes.get_xlabel() == "step"
    line = next(line for line in axes.lines if line.get_label() == "needle past the window, auto")
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([10, 20], pytest.approx([50, 97]))
    assert not any("back" in str(line.get_label()) for line in axes.lines)


def test_losses_that_are_not_finite_are_marked(tmp_path: Path, drawn: dict[str, Figure]) -> None:
    path = make_training(
        tmp_path, steps=30, status="nan", reason="x", losses=lambda s: None if s > 20 else 3.0
    )
    plot_training(load_training(path), tmp_path)
    axes = drawn["loss"].axes[0]
    assert axes.get_title(loc="right") == "not finite at step 21"
    assert list(axes.lines[-1].get_xdata()) == [21, 21]
    assert "(nan)" in drawn["loss"].texts[0].get_text()


def test_only_what_there_is_is_drawn(tmp_path: Path) -> None:
    path = make_training(tmp_path, steps=5, gates=False, needle=None, without=None)
    files = plot_training(load_training(path), tmp_path / "drawn", ["png", "svg"])
    assert [file.name for file in files] == ["loss.png", "loss.svg", "speed.png", "speed.svg"]
    assert files[0].read_bytes()[:4] == b"\x89PNG"
    again = plot_training(load_training(path), tmp_path / "again", ["png", "svg"])
    assert [a.read_bytes() for a in files] == [b.read_bytes() for b in again]


def test_one_answer_without_a_distance_is_no_figure(tmp_path: Path, drawn: dict[str, Figure]) -> None:
    training = load_training(make_training(tmp_path, steps=3, needle=None, without=None))
    row = {"step": 3, "what": "next byte, held-out", "accuracy": 0.4, "chance": 0.2, "distance": None}
    training.evaluation.append({**row, "count": 99, "route": "auto"})
    plot_training(training, tmp_path)
    assert "needle" not in drawn
    training.evaluation.append({**training.evaluation[0], "step": 2})
    plot_training(training, tmp_path)
    assert drawn["needle"].axes[0].lines[0].get_label() == "next byte, held-out, auto"


def test_nothing_to_draw(tmp_path: Path) -> None:
    empty = load_training(make_training(tmp_path, steps=0, gates=False, needle=None, without=None))
    with pytest.raises(PresentError, match=r"has nothing to draw: no step was logged$"):
        plot_training(empty, tmp_path)
    with pytest.raises(PresentError, match=r"^format is 'gif'; allowed: png, svg$"):
        plot_training(load_training(make_training(tmp_path, steps=3)), tmp_path, ["gif"])
    with pytest.raises(StoreError, match=r"is a scorecard, which has no figure; nsabench report shows it$"):
        load_drawable(make_scorecard(tmp_path))
