"""A page as Markdown, and as one HTML file that needs no other."""

import base64
import re
from collections.abc import Mapping
from pathlib import Path

import jinja2

from nsabench.present.page import Page, Picture

_TEMPLATES = Path(__file__).parent / "templates"
_WORDS = {
    "good": ("GO", "met", "ok", "pass", "FASTER", "SAME"),
    "bad": ("NO-GO", "not met", "not measured", "wrong", "nan", "FAIL", "error", "hang", "INVALID", "SLOWER"),
    "doubt": (
        "not measured;",
        "CONDITIONAL",
        "INCONCLUSIVE",
        "unsupported",
        "differs",
        "oom",
        "timeout",
        "invalid",
    ),
}


def to_html(page: Page) -> str:
    """The page as one HTML file: style and figures within, nothing to load."""
    return _environment(escape=True).get_template("report.html.j2").render(page=page)


def to_markdown(page: Page, figures: Mapping[str, str]) -> str:
    """The page as Markdown; `figures` are the paths of its pictures, by name, as the file is to name them."""
    text = _environment(escape=False).get_template("report.md.j2").render(page=page, figures=figures)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def pictures_of(page: Page) -> list[Picture]:
    """The figures of a page, in order."""
    return [b for section in page.sections for b in section.blocks if isinstance(b, Picture)]


def _environment(*, escape: bool) -> jinja2.Environment:
    found = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=escape,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {"base64": _base64, "mark": _mark, "cell": _cell, "plain": _plain, "rule": _rule}
    return found


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _mark(text: str) -> str:
    """How a text of a table is shown: good, bad, doubt, or plain."""
    # A scorecard says more behind the word: `pass*`, `FAIL fp16 0.15 > 1.9e-05`.
    first = re.match(r"(pass|FAIL|not measured;)(?!\w)", text)
    word = first[1] if first else text
    return next((mark for mark, words in _WORDS.items() if word in words), "")


def _cell(text: str) -> str:
    """A text inside a Markdown table."""
    return _plain(text).replace("|", "\\|").replace("\n", " ")


def _plain(text: str) -> str:
    """A text in which Markdown finds nothing to format."""
    return re.sub(r"([\\`*_<\[\]])", r"\\\1", text)


def _rule(places: tuple[int, ...], count: int) -> str:
    """The line below a Markdown table's heads."""
    return "|" + "|".join("---:" if place in places else "---" for place in range(count)) + "|"
