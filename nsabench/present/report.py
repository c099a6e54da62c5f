"""A report over stored runs: the verdict, what stands behind it, and what was not measured."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nsabench.present.criteria import Verdict, judge_material
from nsabench.present.criteria_cells import rows_of
from nsabench.present.evidence import NOT_MEASURED, several
from nsabench.present.field_reports import Beside, answers_reports, field_reports
from nsabench.present.frame import Row, cell_rows, is_dense, planned_routes
from nsabench.present.material import Material, id_of, scorecard_line, training_line, training_status
from nsabench.present.page import Block, Commands, Page, Picture, Section, listed, paragraph
from nsabench.present.pairing import Compared, compare
from nsabench.present.plots import plot_run, set_name
from nsabench.present.report_tables import (
    cells_grid,
    criteria_grid,
    environment_grid,
    left_out_grid,
    machines_of,
    repeat_lines,
    reports_grid,
    runs_grid,
    scorecard_blocks,
    training_grids,
    verdicts_grid,
)
from nsabench.present.training_figures import plot_training
from nsabench.present.verdicts import closing, findings_of
from nsabench.present.wording import arm_text, count_text, digits, fields_text, ratio_text, tokens_text
from nsabench.store import Run

CONDITIONS = (
    "GO: every criterion is met, and nothing limits it. CONDITIONAL: every criterion is met, with the limits "
    "listed. NO-GO: a criterion is not met, or nothing measured it."
)


def make_page(
    material: Material,
    *,
    criteria: Mapping[str, Any] | None = None,
    origin: str = "--criteria",
    reports: bool | None = None,
    command: str = "",
    note: Callable[[str], object] = lambda text: None,
) -> tuple[Page, Verdict, list[Beside]]:
    """The report, its verdict, and the field reports beside ours (empty where they are not shown).

    `criteria` in place of those the runs declare, and `origin`, where they come from. `reports`: whether the
    field reports are shown; None where the runs hold checks that answer them. `command` is the one that makes
    this report; what figures leave out goes line by line to `note`.
    """
    verdict = judge_material(material, criteria, origin)
    shown = answers_reports(material) if reports is None else reports
    beside = field_reports(material) if shown else []
    sections = [
        Section("Summary", tuple(_summary(material, verdict, beside))),
        Section("Criteria", (paragraph(CONDITIONS), criteria_grid(verdict))),
    ]
    if verdict.limits:
        limits = [f"{limit.kind}: {limit.text}" for limit in verdict.limits]
        sections.append(Section("What limits it", (listed(limits),)))
    if beside:
        about = (
            "Five field reports on an earlier NSA code, each with its figures as written, and the same thing "
            "read from the runs of this report."
        )
        sections.append(Section("Field reports", (paragraph(about), reports_grid(beside))))
    sections += _measured(material, note)
    sections += [
        Section("What was not measured", tuple(_left_out(material, verdict, beside))),
        Section("Environment", (environment_grid(material),)),
        Section("To repeat it", (Commands((*repeat_lines(material), *filter(None, [command]))),)),
        Section("Where it comes from", (runs_grid(material),)),
    ]
    title = f"nsabench report: {several(len(material.runs), 'run')}"
    return Page(title, verdict.word, why_text(verdict), tuple(sections)), verdict, beside


def why_text(verdict: Verdict) -> str:
    """The verdict in a sentence."""
    total = several(len(verdict.checks), "criterion").replace("criterions", "criteria")
    missing = sum(check.found.outcome == NOT_MEASURED for check in verdict.checks)
    wrong = len(verdict.unmet) - missing
    if not verdict.checks:
        return "no criterion was declared, and there is nothing to hold the defaults against"
    if verdict.unmet:
        parts = [f"{wrong} not met"] * bool(wrong) + [f"{missing} without a measurement"] * bool(missing)
        return f"of {total}, {' and '.join(parts)}"
    if verdict.limits:
        return f"{_all(total)} met, with {several(len(verdict.limits), 'limit')}"
    return f"{_all(total)} met, and nothing limits it"


def _all(total: str) -> str:
    return "the one criterion is" if total.startswith("1 ") else f"all {total} are"


def _summary(material: Material, verdict: Verdict, beside: Sequence[Beside]) -> list[Block]:
    points = [*_cell_points(material)]
    points += [f"Scorecard {id_of(card)}: {scorecard_line(card)}." for card in material.scorecards]
    points += [
        f"Training {id_of(t)}: status {training_status(t) or 'unknown'}; {training_line(t)}."
        for t in material.trainings
    ]
    if beside:
        known = sum(bool(one.ours) for one in beside)
        points.append(f"Of {len(beside)} figures in five field reports, {known} have ours beside them.")
    machines = dict.fromkeys(machine for info in material.infos for machine in machines_of(info))
    blocks: list[Block] = [
        paragraph(f"{verdict.word}: {why_text(verdict)}.", f"Measured on {', '.join(machines)}.")
    ]
    unmet = [
        f"{check.wanted.words}: {check.found.outcome}, {check.found.measured}" for check in verdict.unmet
    ]
    if unmet:
        blocks += [paragraph("Not met:"), listed(unmet)]
    return [*blocks, paragraph("What came out:"), listed(points)] if points else blocks


def _cell_points(material: Material) -> list[str]:
    """How many cells came out how; the times of each route over S; what a comparison says."""
    points = []
    if material.cells:
        points.append(f"Cells: {count_text(rows_of(material)) or 'none'}.")
    for part in material.parts:
        if "comparison" in part.info:
            points += [f"{part.run_id}: {text}." for text in closing(findings_of(part))]
            continue
        rows = cell_rows(part.cells)
        groups: dict[tuple[str, str], list[Compared]] = {}
        for cell in compare(rows, part.samples, {part.run_id: planned_routes(part.info)}):
            if cell.row["status"] == "ok" and not is_dense(cell.row):
                shape = fields_text(cell.row, ("phase", "passes", "scope", "dtype", "device"))
                groups.setdefault((shape, arm_text(cell.row)), []).append(cell)
        points += [f"{shape}: {_over_sizes(route, cells)}." for (shape, route), cells in groups.items()]
    return points


def _over_sizes(route: str, cells: Sequence[Compared]) -> str:
    """The first and the last size of a route, and there its speed relative to dense attention."""
    ends = sorted(cells, key=lambda cell: (cell.row["S"], cell.row["B"]))
    texts = []
    for cell in ends[:: max(1, len(ends) - 1)][:2]:
        said = f"{digits(cell.row['ms_total'])} ms at {_size(cell.row)}"
        if cell.x_dense is not None:
            said += f" ({ratio_text(cell.x_dense.point)} x the speed of {cell.dense_name})"
        texts.append(said)
    return f"{route} {' to '.join(texts)}"


def _size(row: Row) -> str:
    return f"S={tokens_text(row['S'])}" + (f" B={row['B']}" if row["B"] != 1 else "")


def _measured(material: Material, note: Callable[[str], object]) -> list[Section]:
    """The tables and figures of every kind of run."""
    sections = []
    if material.cells:
        blocks: list[Block] = []
        for run in material.cells:
            blocks.append(verdicts_grid(run) if "comparison" in run.info else cells_grid(run))
        sections.append(Section("Cells", (*blocks, *_cell_pictures(material.cells, note))))
    if material.scorecards:
        cards = [block for card in material.scorecards for block in scorecard_blocks(card)]
        sections.append(Section("Scorecards", tuple(cards)))
    if material.trainings:
        blocks = []
        for training in material.trainings:
            line = f"{id_of(training)}: {training_status(training) or 'unknown'}; {training_line(training)}."
            blocks += [paragraph(line), *training_grids(training)]
            if training.steps:
                with tempfile.TemporaryDirectory() as folder:
                    files = plot_training(training, Path(folder), ["png"])
                    blocks += _pictures(files, id_of(training))
        sections.append(Section("Trainings", tuple(blocks)))
    return sections


def _cell_pictures(runs: Sequence[Run], note: Callable[[str], object]) -> list[Picture]:
    """The figures of each run by itself; none where no cell is ok."""
    found = []
    for run in runs:
        if not (run.cells["status"] == "ok").any():
            continue
        with tempfile.TemporaryDirectory() as folder:
            # In a folder of its name, as its figures' names are short there.
            files = plot_run(run, Path(folder) / set_name([run.run_id]), ["png"], note=note)
            found += _pictures(files, run.run_id)
    return found


def _pictures(files: Sequence[Path], run_id: str) -> list[Picture]:
    return [
        Picture(f"{run_id}-{file.stem}", f"{file.stem.replace('-', ', ')} of {run_id}", file.read_bytes())
        for file in files
    ]


def _left_out(material: Material, verdict: Verdict, beside: Sequence[Beside]) -> list[Block]:
    grid = left_out_grid(material)
    criteria = [
        f"criterion {check.wanted.name}, {check.wanted.words}: {check.found.measured}"
        for check in verdict.checks
        if check.found.outcome == NOT_MEASURED
    ]
    criteria += [
        f"field report {one.asked.report}, {one.asked.what}: {one.asked.command}"
        for one in beside
        if not one.ours
    ]
    blocks: list[Block] = [listed(criteria)] if criteria else []
    if grid.lines:
        blocks.append(grid)
    return blocks or [paragraph("Everything that was planned was measured.")]
