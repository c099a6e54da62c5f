"""`--impl peer:...`: from the command line to a row, through stand-ins of the clones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nsabench.peers import sfnsa, xunhaolai
from nsabench.store import Run

Call = Callable[..., Any]
SUITE = """
about = "peers"
[shape]
device = "cpu"
dtype = "fp32"
scope = "core"
dim = 32
heads = 2
groups = 1
dk = 16
l = 8
d = 4
l_sel = 32
n_sel = 4
w = 16
[policy]
rounds = 2
shares = false
alone = false
[[sweep]]
phase = "prefill"
S = 40
routes = ["gather", "cmp=sdpa,win=off"]
impl = ["nsa", "peer:sfnsa"]
"""


@pytest.fixture
def on_cpu(clone_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (xunhaolai, sfnsa):
        monkeypatch.setattr(module, "needs_gpu", lambda request: "")
    clone_folder(flash=False)


def test_peers_are_rows_beside_nsa(
    call: Call, tiny: list[str], the_run: Callable[[], Run], on_cpu: None
) -> None:
    sizes = ("--scope", "core", "--l-sel", "32", "--dk", "16", "--selection", "random", "--in-process")
    asked = ("--impl", "nsa,peer:xunhaolai,peer:sfnsa,peer:fla-core", "--routes", "cmp=sdpa,win=off")
    done = call("prefill", *tiny, *sizes, *asked, "--json")
    assert done.code == 0
    rows = {row["impl"]: row for row in done.rows}
    assert [row["status"] for row in rows.values()].count("ok") == 3
    for impl in ("peer:xunhaolai", "peer:sfnsa"):
        row = rows[impl]
        assert (row["status"], row["route"]) == ("ok", "win=off")
        assert row["provider"].startswith(f"{impl.partition(':')[2]} sources ")
    assert rows["peer:fla-core"]["status"] == "unsupported"
    assert {cell["route"] for cell in the_run().info["plan"]} == {"cmp=sdpa,win=off", "win=off"}


def test_a_suite_measures_them(call: Call, on_cpu: None, tmp_path: Path) -> None:
    file = tmp_path / "peers.toml"
    file.write_text(SUITE)
    done = call("suite", "run", str(file), "--in-process", "--no-plots", "--json")
    found = {(row["impl"], row["route"]): row for row in done.rows}
    assert found["peer:sfnsa", "win=off"]["status"] == "ok"
    assert found["peer:sfnsa", "auto"]["reason"].endswith("ask with win=off")
    assert len(found) == 4


def test_a_peer_alone_that_cannot_run_is_bad_usage(call: Call, tiny: list[str], on_cpu: None) -> None:
    done = call("prefill", *tiny, "--impl", "peer:sfnsa")
    assert (done.code, done.out) == (2, "")
    assert done.err == (
        "nsabench: --impl: 'peer:sfnsa' cannot run here: a peer is timed in batched prefill fwd core only: "
        "scope is module\n"
    )
