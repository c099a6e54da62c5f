"""The report as Markdown and as one HTML file: whole, well-formed, with nothing to load."""

from __future__ import annotations

import base64
import html.parser
import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from nsabench.present.material import Material, collected, load_material
from nsabench.present.page import Commands, Grid, Page, Section, listed, paragraph
from nsabench.present.report import make_page
from nsabench.present.report_text import pictures_of, to_html, to_markdown
from tests.nsabench.present.conftest import make_run
from tests.nsabench.present.contests import make_contest
from tests.nsabench.present.other_runs import make_scorecard, make_training, passing, score

VOID = {"meta", "link", "img", "br", "hr", "input"}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Reader(html.parser.HTMLParser):
    """Checks that tags close in order, and keeps what the page would load and what it says."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.text: list[str] = []
        self.seen: dict[str, int] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen[tag] = self.seen.get(tag, 0) + 1
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "srcset", "href", "data", "poster", "action"):
                self.loads.append(value or "")
            if name == "id":
                self.ids.append(value or "")
            assert not name.startswith("on"), name

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.text.append(data)


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    return reader


def all_of(root: Path) -> Material:
    failed = {
        ("gather", 2048): ("oom", "18 GiB asked, 4 free"),
        ("gather", 4096): ("unsupported", "no <GPU>"),
    }
    run = make_run(failed=failed, baselines=("dense",), rounds=6)
    run.info["repro"] = "nsabench decode --S 1k,2k,4k --routes 'sdpa;gather'"
    broken = score("values", "sel:gather", status="fail", reason="off & by 0.3", failed=2, max_abs_err=0.3)
    others = load_material(
        [
            make_scorecard(root, [*passing(), broken]),
            make_training(root, steps=40),
            make_training(root, steps=9, status="nan", reason="layer 1, sel", settings={"precision": "fp16"}),
        ]
    )
    contest = make_contest({"auto": 1.0, "dense": 1.4}, rounds=8)
    return Material((run, contest), others.scorecards, others.trainings)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    made, _, _ = make_page(all_of(tmp_path_factory.mktemp("runs")), command="nsabench report results")
    return made


@pytest.fixture(scope="module")
def text(page: Page) -> str:
    return to_html(page)


def test_the_page_is_one_file_that_loads_nothing(page: Page, text: str) -> None:
    reader = read(text)
    sections = {load[1:] for load in reader.loads if load.startswith("#")}
    assert sections == {section.anchor for section in page.sections} == set(reader.ids)
    inlined = [load for load in reader.loads if not load.startswith("#")]
    assert len(inlined) == reader.seen["img"] == len(pictures_of(page)) > 8
    for load in inlined:
        head, _, data = load.partition(",")
        assert head == "data:image/png;base64"
        assert base64.b64decode(data, validate=True)[:8] == b"\x89PNG\r\n\x1a\n"
    assert "script" not in reader.seen
    assert re.findall(r"(?:https?:)?//[a-z]", re.sub(r'src="data:[^"]*"', "", text)) == []
    assert "@import" not in text
    assert re.search(r"url\(", text) is None


def test_it_says_everything(page: Page, text: str) -> None:
    assert [section.title for section in page.sections] == [
        "Summary",
        "Criteria",
        "What limits it",
        "Field reports",
        "Cells",
        "Scorecards",
        "Trainings",
        "What was not measured",
        "Environment",
        "To repeat it",
        "Where it comes from",
    ]
    said = " ".join(" ".join(read(text).text).split())
    for words in (
        "NO-GO",
        "of 7 criteria, 3 not met and 1 without a measurement",
        "no failed cell",
        "18 GiB asked, 4 free",
        "no <GPU>",
        "off & by 0.3",
        "MAE 0.152",
        "dense is SLOWER than auto by 40 %",
        "nsabench decode --S 1k,2k,4k --routes 'sdpa;gather'",
        "nsabench verify --full",
        "nsabench report results",
        "AMD EPYC 7B13",
        "1a2b3c4d5e6f",
        "2.13.0+cpu",
        "status nan",
        "the window is 32 tokens",
    ):
        assert words in said, words


def test_markdown_has_the_same_sections_and_figures(page: Page) -> None:
    figures = {picture.name: f"figures/{picture.name}.png" for picture in pictures_of(page)}
    text = to_markdown(page, figures)
    assert text.startswith("# nsabench report: 5 runs\n\n**NO-GO**: of 7 criteria, 3 not met")
    heads = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert heads == [section.title for section in page.sections]
    assert re.findall(r"^!\[.*\]\((.*)\)$", text, re.MULTILINE) == list(figures.values())
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        columns = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(columns) == 1, table[:200]
    assert "no \\<GPU>" in text
    assert "```bash\nnsabench decode" in text


def small(**changes: object) -> Page:
    told = {"title": "T", "word": "GO", "why": "all", "sections": ()}
    return Page(**{**told, **changes})  # type: ignore[arg-type]


def test_what_is_said_cannot_break_the_page() -> None:
    nasty = "<script>alert(1)</script> & \"q\" 'a' | `b` *c* _d_ [e](f)"
    blocks = (paragraph(nasty), listed([nasty]), Grid(nasty, (nasty,), ((nasty,),), (), (nasty,)))
    page = small(title=nasty, why=nasty, sections=(Section("S", (*blocks, Commands(("echo '<&>'",)))),))
    reader = read(to_html(page))
    assert "script" not in reader.seen
    assert sum(nasty in part for part in reader.text) >= 7
    (row,) = re.findall(r"^\| (?!---)(.*) \|$", to_markdown(page, {}), re.MULTILINE)[1:]
    assert row == r"""\<script>alert(1)\</script> & "q" 'a' \| \`b\` \*c\* \_d\_ \[e\](f)"""


@pytest.mark.parametrize(("word", "mark"), [("GO", "good"), ("CONDITIONAL", "doubt"), ("NO-GO", "bad")])
def test_the_verdict_has_its_colour(word: str, mark: str) -> None:
    assert f'<div class="verdict {mark}"><strong>{word}</strong>' in to_html(small(word=word))


def test_a_table_marks_what_it_says() -> None:
    words = {
        "pass": "good",
        "pass*": "good",
        "FAIL fp16 0.3 > 1e-05": "bad",
        "passes": "",
        "not measured; x": "doubt",
    }
    page = small(sections=(Section("S", (Grid("", ("a",), tuple((word,) for word in words)),)),))
    marks = re.findall(r'<td class="(\w*)">', to_html(page))
    assert marks == list(words.values())


def test_reports_are_shown_as_asked() -> None:
    refused = {("sdpa", 512): ("unsupported", "needs a GPU")}
    material = collected([make_run(S=(512,), routes=("sdpa",), failed=refused)])
    for asked, shown in ((None, False), (True, True), (False, False)):
        page, _, beside = make_page(material, reports=asked)
        assert ("Field reports" in [section.title for section in page.sections]) is shown
        assert bool(beside) is shown


def test_a_run_without_anything_measured_makes_a_page() -> None:
    run = make_run(S=(512,), routes=("sdpa",), failed={("sdpa", 512): ("unsupported", "needs a GPU")})
    page, verdict, _ = make_page(collected([run]))
    assert (page.word, len(pictures_of(page))) == ("NO-GO", 0)
    assert "needs a GPU" in to_html(page)
    assert page.why == f"of {len(verdict.checks)} criteria, 3 without a measurement"


def shot(folder: Path, page: Path, width: int, height: int, *more: str) -> bytes:
    assert CHROMIUM is not None
    target = folder / "shot.png"
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-background-networking --disable-component-update "
        "--disable-sync --no-first-run --hide-scrollbars"
    )
    subprocess.run(
        [
            CHROMIUM,
            *flags.split(),
            f"--user-data-dir={folder / 'profile'}",
            f"--window-size={width},{height}",
            f"--screenshot={target}",
            *more,
            page.as_uri(),
        ],
        check=True,
        capture_output=True,
        timeout=100,
    )
    return target.read_bytes()


PROBE = """<body style="margin:0"><iframe id="f" src="{page}" style="width:{width}px;height:800px;border:0">
</iframe><script>
f.onload = () => {{
  const d = f.contentDocument, wide = [...d.querySelectorAll("body *")].filter(
    e => !e.closest(".scroll, pre") && e.getBoundingClientRect().right > {width} + 1);
  const lost = [...d.images].filter(i => !i.complete || !i.naturalWidth).length;
  document.title = JSON.stringify([d.documentElement.scrollWidth, wide.length, lost, d.images.length]);
}};
</script></body>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
@pytest.mark.parametrize("width", [400, 1280])
def test_nothing_runs_over_the_side_of_a_window(text: str, page: Page, tmp_path: Path, width: int) -> None:
    (tmp_path / "report.html").write_text(text)
    probe = tmp_path / "probe.html"
    probe.write_text(PROBE.format(page="report.html", width=width))
    assert CHROMIUM is not None
    flags = (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--allow-file-access-from-files",
        "--hide-scrollbars",
        "--no-first-run",
    )
    quiet = ("--disable-background-networking", "--disable-component-update", "--disable-sync")
    where = (f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000", "--dump-dom")
    command = [CHROMIUM, *flags, *quiet, *where, probe.as_uri()]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=100)
    told = re.search(r"<title>\[(\d+),(\d+),(\d+),(\d+)\]</title>", done.stdout)
    assert told is not None, done.stdout[-500:]
    scroll, over, lost, images = map(int, told.groups())
    assert (scroll, over, lost, images) == (width, 0, 0, len(pictures_of(page)))


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
def test_it_is_drawn_in_the_light_and_in_the_dark(text: str, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text(text)
    light = shot(tmp_path, tmp_path / "report.html", 900, 600)
    dark = shot(tmp_path, tmp_path / "report.html", 900, 600, "--blink-settings=preferredColorScheme=0")
    assert struct.unpack(">II", light[16:24]) == (900, 600)
    from matplotlib.image import imread

    corners = []
    for name, data in (("light", light), ("dark", dark)):
        (tmp_path / f"{name}.png").write_bytes(data)
        corners.append(float(imread(tmp_path / f"{name}.png")[3, 3, :3].mean()))
    assert corners[0] > 0.95
    assert corners[1] < 0.2
