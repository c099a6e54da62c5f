"""The tables of a report, as plain texts."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from nsabench.present.cell_text import scaled, time_range
from nsabench.present.criteria import Verdict
from nsabench.present.criteria_cells import unmeasured_cells
from nsabench.present.evidence import cell_name, several
from nsabench.present.field_reports import Beside
from nsabench.present.frame import Row, cell_rows, planned_routes
from nsabench.present.material import (
    Material,
    id_of,
    is_ours,
    last_gates,
    last_step,
    losses_of,
    setting_of,
    training_status,
)
from nsabench.present.naming import commit_of, machine_of
from nsabench.present.page import Block, Grid, listed, paragraph
from nsabench.present.pairing import compare
from nsabench.present.scorecard import (
    BRANCHES,
    LEGEND,
    differing_lines,
    failure_lines,
    head_of,
    parts_of,
)
from nsabench.present.tables import compared_grid
from nsabench.present.verdicts import findings_of, percent_text, ratio_digits
from nsabench.present.wording import MISSING, bytes_text, digits, range_text, tokens_text
from nsabench.store import Run
from nsabench.store.scorecard import Scorecard
from nsabench.store.training import Training

_KINDS = {"verify": "scorecard", "train": "training"}
_MOST_CELLS = 400


def criteria_grid(verdict: Verdict) -> Grid:
    """Every criterion with what was measured, and the rows that show it."""
    lines = [
        (
            check.wanted.name,
            check.found.outcome,
            check.wanted.words,
            check.found.measured,
            "; ".join(check.found.evidence) or MISSING,
            check.origin,
        )
        for check in verdict.checks
    ]
    return Grid("", ("criterion", "outcome", "wanted", "measured", "evidence", "declared by"), tuple(lines))


def cells_grid(run: Run) -> Grid:
    """The cells of one run."""
    cells = compare(cell_rows(run.cells), run.samples, {run.run_id: planned_routes(run.info)})
    title, headers, lines, notes = compared_grid(cells[-_MOST_CELLS:])
    texts = {"run", "route", "status", "phase", "passes", "mode", "scope", "dtype", "device", "selection"}
    right = [i for i, head in enumerate(headers) if head not in texts and not head.startswith("%")]
    if len(cells) > _MOST_CELLS:
        notes = [*notes, f"the last {_MOST_CELLS} of {len(cells)} cells; nsabench results {run.path} has all"]
    heads = tuple(head.replace(" /", "/") for head in headers)
    return Grid(f"{run.run_id}: {title}", heads, tuple(map(tuple, lines)), tuple(right), tuple(notes))


def verdicts_grid(run: Run) -> Grid:
    """The verdicts of a comparison."""
    comparison = findings_of(run)
    lines = []
    for finding in comparison.findings:
        ratio = finding.ratio
        known = ratio is not None and finding.verdict != "INVALID"
        way = "slower" if ratio is not None and ratio.point > 1 else "faster"
        lines.append(
            (
                finding.shape,
                finding.first,
                _ms(finding.base),
                finding.side,
                _ms(finding.row),
                MISSING if ratio is None else ratio_digits(ratio.point),
                MISSING if ratio is None else range_text(ratio.lo, ratio.hi, ratio_digits),
                f"{percent_text(ratio.point)} {way}" if known and ratio is not None else MISSING,
                finding.verdict,
                finding.why,
            )
        )
    heads = ("shape", "first", "ms", "side", "ms", "ratio", "95 %", "difference", "verdict", "why")
    notes = ("ratio: time over that of the first side; below 1 is faster", *comparison.notes)
    return Grid(f"{run.run_id}: {comparison.title}", heads, tuple(lines), (2, 4, 5, 6), notes)


def _ms(row: Row | None) -> str:
    if row is None or row["status"] != "ok":
        return MISSING if row is None else str(row["status"])
    return f"{scaled(row['ms_total'])} ({time_range(row)})"


def scorecard_blocks(card: Scorecard) -> list[Block]:
    """A matrix for each branch, rules as rows and subjects as columns; then what failed and what differs."""
    blocks: list[Block] = []
    for part in parts_of(card.rows):
        if not part.subjects:
            continue
        heads = (" ".join(head_of(part.branch, s)).replace(" :", ":") for s in part.subjects)
        lines = []
        for rule in part.rules:
            cells = [part.cells.get((rule, subject)) for subject in part.subjects]
            lines.append((rule, *("" if cell is None else " ".join(cell.lines) for cell in cells)))
        title = f"{id_of(card)}: {BRANCHES[part.branch]}"
        blocks.append(Grid(title, ("rule", *heads), tuple(lines), (), (LEGEND,)))
    for title, texts in (
        ("Failed:", failure_lines(card.rows)),
        ("Different by declaration:", differing_lines(card.rows)),
    ):
        blocks += [paragraph(title), listed(texts)] if texts else []
    return [*blocks, *_worst_grid(card)]


def _worst_grid(card: Scorecard) -> list[Grid]:
    """For each subject of ours and dtype the row whose error comes nearest to its budget."""
    worst: dict[tuple[str, str], Mapping[str, Any]] = {}
    for row in card.rows:
        if row["max_abs_err"] is None or not row["budget"] or not is_ours(row, card.info):
            continue
        key = row["subject"], row["dtype"]
        if key not in worst or _part(row) > _part(worst[key]):
            worst[key] = row
    lines = [
        (*key, row["rule"], *map(_error, (row["max_abs_err"], row["budget"])), f"{100 * _part(row):.0f} %")
        for key, row in worst.items()
    ]
    heads = ("subject", "dtype", "rule", "max error", "budget", "of budget")
    title = f"{id_of(card)}: the error nearest to its budget"
    return [Grid(title, heads, tuple(lines), (3, 4, 5))] if lines else []


def _part(row: Mapping[str, Any]) -> float:
    return float(row["max_abs_err"]) / float(row["budget"])


def _error(value: float) -> str:
    return f"{value:.2e}"


def training_grids(training: Training) -> list[Grid]:
    """Steps in a few lines, what was retrieved, the gates at the end, the routes, the overlap."""
    run = id_of(training)
    return [
        grid
        for grid in (
            _steps_grid(training, run),
            _evaluation_grid(training, run),
            _gates_grid(training, run),
            _routes_grid(training, run),
        )
        if grid.lines
    ]


def _steps_grid(training: Training, run: str) -> Grid:
    """Ten steps or so, spread evenly, the first and the last among them."""
    count = len(training.steps)
    places = sorted({round(i * (count - 1) / 9) for i in range(10)}) if count else []
    lines = [
        (
            str(row["step"]),
            "not finite" if row["loss"] is None else f"{row['loss']:.4f}",
            digits(row["tokens_per_s"]),
            digits(row["grad_norm"]),
            MISSING if row["lr"] is None else f"{row['lr']:.2e}",
            MISSING if row["overflows"] is None else str(row["overflows"]),
            bytes_text(row["peak_alloc_bytes"]),
            bytes_text(row["rss_bytes"]),
        )
        for row in (training.steps[place] for place in places)
    ]
    heads = ("step", "loss, nats", "tokens/s", "grad norm", "lr", "overflows", "peak on GPU", "resident")
    notes = (f"{len(lines)} of {count} logged steps",) if len(lines) < count else ()
    return Grid(f"{run}: steps", heads, tuple(lines), tuple(range(len(heads))), notes)


def _evaluation_grid(training: Training, run: str) -> Grid:
    window = setting_of(training, "w")
    lines = [
        (
            str(row["step"]),
            row["what"],
            row["route"],
            MISSING if row["distance"] is None else str(row["distance"]),
            MISSING if row["accuracy"] is None else f"{100 * row['accuracy']:.1f} %",
            MISSING if row["chance"] is None else f"{100 * row['chance']:.1f} %",
            MISSING if row["count"] is None else str(row["count"]),
        )
        for row in training.evaluation
    ]
    heads = ("step", "task", "route", "distance, tokens", "accuracy", "chance", "answers")
    notes = (f"the window is {window} tokens",) if window is not None else ()
    return Grid(f"{run}: evaluation", heads, tuple(lines), (0, 3, 4, 5, 6), notes)


def _gates_grid(training: Training, run: str) -> Grid:
    overlap = {row["layer"]: row for row in training.overlap}
    lines = [
        (
            str(row["layer"]),
            *(
                MISSING if row[f"share_{b}"] is None else f"{100 * row[f'share_{b}']:.1f}"
                for b in ("cmp", "sel", "win")
            ),
            MISSING if row["entropy"] is None else f"{row['entropy']:.3f}",
            "yes" if row["collapsed"] else "no",
            _number(overlap.get(row["layer"]), "neighbour_overlap"),
            _number(overlap.get(row["layer"]), "union_blocks"),
        )
        for row in last_gates(training)
    ]
    heads = (
        "layer",
        "cmp, %",
        "sel, %",
        "win, %",
        "entropy, nats",
        "collapsed",
        "neighbour overlap",
        "union, blocks",
    )
    notes = (
        (f"at step {last_gates(training)[0]['step']}; the entropy of equal gates is 1.099",) if lines else ()
    )
    return Grid(f"{run}: gates at the end", heads, tuple(lines), (0, 1, 2, 3, 4, 6, 7), notes)


def _number(row: Mapping[str, Any] | None, name: str) -> str:
    return MISSING if row is None else digits(row[name])


def _routes_grid(training: Training, run: str) -> Grid:
    lines = [
        (
            str(r["layer"]),
            r["branch"],
            r["backend"],
            str(r["calls"]),
            str(r["refused"]),
            r["reason"] or MISSING,
        )
        for r in training.routes
    ]
    heads = ("layer", "branch", "backend", "calls", "refused", "why it refused")
    return Grid(f"{run}: routes taken", heads, tuple(lines), (0, 3, 4))


def reports_grid(found: Sequence[Beside]) -> Grid:
    """The field reports' figures beside ours."""
    lines = [
        (
            one.asked.report,
            one.asked.what,
            one.asked.reported,
            one.ours or f"not measured; {one.asked.command}",
            one.mistake or MISSING,
            one.run_id or MISSING,
        )
        for one in found
    ]
    notes = (
        "Theirs: mean absolute errors (MAE) and times on their machines, an A100 and an RTX 3090. "
        "Ours: the largest error of all cases, which no mean exceeds, on the machine named.",
    )
    heads = ("report", "what", "they saw", "ours", "their mistake, made here", "run")
    return Grid("", heads, tuple(lines), (), notes)


def runs_grid(material: Material) -> Grid:
    """Where everything comes from."""
    lines = []
    for info in material.infos:
        environment = info.get("environment") or {}
        tree = (
            "unknown" if not environment.get("commit") else "dirty" if environment.get("dirty") else "clean"
        )
        lines.append(
            (
                str(info["run_id"]),
                _kind(info),
                str(info.get("created") or MISSING).replace("T", " ").removesuffix("Z"),
                str(environment.get("commit") or "unknown")[:12],
                tree,
                ", ".join(machines_of(info)),
                str(info.get("seed", MISSING)),
                " ".join(info.get("tags") or ()) or MISSING,
                str(info.get("schema_version") or MISSING),
            )
        )
    heads = ("run", "kind", "made, UTC", "commit", "tree", "machine", "seed", "tags", "schema")
    return Grid("", heads, tuple(lines), (6, 8))


def _kind(info: Mapping[str, Any]) -> str:
    return _KINDS.get(str(info.get("kind", "")), "comparison" if "comparison" in info else "cells")


def machines_of(info: Mapping[str, Any]) -> list[str]:
    """The CPU and the GPUs of the machine."""
    gpus = [str(gpu["name"]) for gpu in (info.get("environment") or {}).get("gpus") or ()]
    return [machine_of(info, "cpu"), *gpus]


def environment_grid(material: Material) -> Grid:
    """One column for each environment that differs, what differs not in one."""
    columns: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for info in material.infos:
        facts = tuple(_facts(info).items())
        columns.setdefault(facts, []).append(str(info["run_id"]))
    names = list(dict.fromkeys(name for facts in columns for name, _ in facts))
    lines = [(name, *(dict(facts).get(name, MISSING) for facts in columns)) for name in names]
    heads = ["all runs"] if len(columns) == 1 else [", ".join(runs) for runs in columns.values()]
    return Grid("", ("", *heads), tuple(lines))


def _facts(info: Mapping[str, Any]) -> dict[str, str]:
    environment = info.get("environment") or {}
    cpu, torch = environment.get("cpu") or {}, environment.get("torch") or {}
    found = {
        "commit": commit_of(info),
        "nsabench": environment.get("nsabench"),
        "CPU": cpu.get("model"),
        "cores, threads, usable": _joined(cpu.get(name) for name in ("cores", "threads", "affinity")),
        "memory": bytes_text(cpu.get("memory_bytes")),
        "torch": torch.get("version"),
        "threads of torch": torch.get("threads"),
        "CUDA, cuDNN, driver": _joined(torch.get(name) for name in ("cuda", "cudnn", "driver")),
        "platform": environment.get("platform"),
        "Python": environment.get("python"),
    }
    for number, gpu in enumerate(environment.get("gpus") or ()):
        memory, l2 = bytes_text(gpu.get("memory_bytes")), bytes_text(gpu.get("l2_bytes"))
        found[f"GPU {number}"] = f"{gpu.get('name')}, {gpu.get('sm_count')} SMs, {memory}, L2 {l2}"
    for device, peaks in (info.get("peaks") or {}).items():
        rates = [f"{name} {digits(rate)}" for name, rate in (peaks.get("matmul_tflops") or {}).items()]
        found[f"measured peaks of {device}"] = (
            f"copy {digits(peaks.get('copy_gbps'))} GB/s; TFLOP/s: {', '.join(rates) or MISSING}"
        )
    found["packages"] = ", ".join(f"{k} {v}" for k, v in (environment.get("packages") or {}).items())
    found["variables"] = ", ".join(f"{k}={v}" for k, v in (environment.get("env") or {}).items())
    return {name: str(value) for name, value in found.items() if value not in (None, "", MISSING)}


def _joined(values: Any) -> str:
    texts = [MISSING if value is None else str(value) for value in values]
    return ", ".join(texts) if set(texts) != {MISSING} else ""


def left_out_grid(material: Material) -> Grid:
    """What was not measured and why: equal reasons once, with how often."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for part in material.parts:
        for row in cell_rows(part.cells):
            if row["status"] != "ok":
                found.setdefault((part.run_id, row["status"], row["reason"]), []).append(cell_name(row))
    for run in material.cells:
        for cell in unmeasured_cells(run):
            key = (run.run_id, "not measured", "ended before its turn, or its budget did")
            found.setdefault(key, []).append(f"{cell['phase']} S={tokens_text(cell['S'])} {cell['route']}")
    for card in material.scorecards:
        for row in card.rows:
            if row["status"] == "unsupported":
                found.setdefault((id_of(card), row["status"], row["reason"]), []).append(
                    f"{row['subject']} in {row['dtype']}"
                )
    for training in material.trainings:
        for what, why in _unwatched(training):
            found.setdefault((id_of(training), "not measured", why), []).append(what)
    lines = [
        (run, _some(names), str(len(names)), status, reason) for (run, status, reason), names in found.items()
    ]
    return Grid("", ("run", "what", "how many", "status", "why"), tuple(lines), (2,))


def _some(names: Sequence[str]) -> str:
    unique = list(dict.fromkeys(names))
    more = f" and {len(unique) - 3} more" if len(unique) > 3 else ""
    return ", ".join(unique[:3]) + more


def _unwatched(training: Training) -> list[tuple[str, str]]:
    status = training_status(training)
    wanted = setting_of(training, "steps")
    found = []
    if not losses_of(training):
        found.append(("loss", "no step was logged"))
    elif status != "ok" and isinstance(wanted, int) and last_step(training) < wanted:
        left = several(wanted - last_step(training), "step")
        found.append(
            (f"the last {left}", f"status {status}: {training.info.get('reason') or 'no reason stored'}")
        )
    if not training.gates:
        found.append(("gate shares", "none were looked at (--no-stats?)"))
    if not training.evaluation:
        found.append(("accuracy", "none was evaluated"))
    return found


def repeat_lines(material: Material) -> list[str]:
    """The commands that made these runs, and those that finish what is not finished."""
    lines = [str(info["repro"]) for info in material.infos if info.get("repro")]
    lines += [shlex.join(["nsabench", "resume", str(r.path)]) for r in material.cells if unmeasured_cells(r)]
    return list(dict.fromkeys(lines))
