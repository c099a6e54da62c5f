"""What a suite may say, and the cells it means."""

from typing import Any

import pytest

from nsabench.plan import AXES, PlanError, Suite, cells_of, groups, parse_suite, sweep, tags_of, unmeasured
from nsabench.plan.suite import MAX_CELLS

HEAD = 'about = "a test"\n'
SIZES = {"dim": 64, "heads": 4, "groups": 2, "dk": 16, "dtype": "fp32"}


def defaults(device: str) -> dict[str, Any]:
    return {**SIZES, "device": "cpu"} if device in ("auto", "cpu") else {**SIZES, "dk": 32, "device": device}


def option(axis: str) -> str:
    return f"--{axis}"


def suite_of(text: str) -> Suite:
    return parse_suite(HEAD + text, name="test")


def cells(text: str, **more: Any) -> list[Any]:
    return cells_of(suite_of(text), defaults, **more)


def test_a_sweep_of_a_suite_is_the_sweep_of_the_same_axes() -> None:
    text = """
    [[sweep]]
    phase = "prefill"
    S = "1k:4k:x2"
    B = [1, 2]
    routes = ["auto", "cmp=sdpa, sel=gather"]
    passes = "fwd, bwd"
    baselines = "dense"
    """
    rest = {"l": 32, "d": 16, "l_sel": 64, "n_sel": 16, "w": 512, "seed": 0, "dv": 16, "mode": "batched"}
    assert cells(text) == sweep(
        phase="prefill",
        S=[1024, 2048, 4096],
        B=[1, 2],
        routes=["auto", "cmp=sdpa,sel=gather"],
        passes=["fwd", "bwd"],
        baselines=["dense"],
        device="cpu",
        **SIZES,
        **rest,
    )


def test_what_is_left_out_is_as_on_the_command_line() -> None:
    found = cells('[[sweep]]\nphase = "decode"')
    assert found == cells_of(Suite.of_options("decode", {}, option), defaults)
    assert [(c.S, c.B, c.route, c.passes, c.mode, c.scope, c.w) for c in found] == [
        (S, 1, "auto", "fwd", "batched", "module", 512) for S in (512, 1024, 2048)
    ]


def test_a_shape_is_the_default_of_all_sweeps_and_a_sweep_says_otherwise() -> None:
    text = """
    [shape]
    dk = 8
    S = 1
    """
    with pytest.raises(PlanError, match=r"^shape\.S: unknown key; known: dim, "):
        suite_of(text)
    text = """
    [shape]
    dk = 8
    scope = "core"
    [[sweep]]
    phase = "decode"
    S = 64
    [[sweep]]
    phase = "decode"
    S = 128
    dk = [4, 12]
    scope = ["module", "core"]
    """
    assert [(c.S, c.dk, c.dv, c.scope) for c in cells(text)] == [
        (64, 8, 8, "core"),
        *((128, dk, dk, scope) for dk in (4, 12) for scope in ("module", "core")),
    ]


def test_every_axis_may_have_several_values() -> None:
    several = {
        "routes": ["auto", "sdpa"],
        "passes": ["fwd", "bwd"],
        "mode": ["batched", "chunked=8"],
        "baselines": ["none"],
        "impl": ["nsa", "dense:flash"],
        "dtype": ["fp32", "bf16"],
        "device": ["cpu", "cuda"],
        "scope": ["module", "core"],
        "selection": ["natural", "overlap=0.5"],
    }
    for axis in AXES:
        values = several.get(axis, [8, 16])
        made = Suite.read("test", {"about": "x", "sweep": [{"phase": "prefill", axis: values}]})
        found = {getattr(c, "route" if axis == "routes" else axis, None) for c in cells_of(made, defaults)}
        assert found == (set(values) if axis != "baselines" else {None}), axis


def test_the_defaults_follow_each_device() -> None:
    text = '[[sweep]]\nphase = "decode"\nS = 64\ndevice = ["auto", "cuda:1"]'
    assert [(c.device, c.dk, c.dv) for c in cells(text)] == [("cpu", 16, 16), ("cuda:1", 32, 32)]


TWO = """
[[sweep]]
phase = "prefill"
S = "1k:16k:x2"
[[sweep]]
phase = "decode"
headline = true
S = "1k:16k:x2"
"""


def test_headlines_come_first_with_a_budget_and_without() -> None:
    phases = ["decode"] * 5 + ["prefill"] * 5
    plain, coarse = cells(TWO), cells(TWO, coarse_first=True)
    assert [c.phase for c in plain] == [c.phase for c in coarse] == phases
    assert [c.S // 1024 for c in plain] == [1, 2, 4, 8, 16] * 2
    assert [c.S // 1024 for c in coarse] == [1, 16, 4, 2, 8] * 2


def test_a_cell_that_two_sweeps_name_is_measured_once_and_beside_its_like() -> None:
    text = """
    [[sweep]]
    phase = "decode"
    S = [64, 128]
    baselines = "dense"
    [[sweep]]
    phase = "decode"
    S = 64
    routes = "auto;sdpa"
    """
    found = cells(text)
    assert [(c.S, c.impl, c.route) for c in found] == [
        (64, "nsa", "auto"),
        (64, "nsa", "sdpa"),
        (64, "dense", "auto"),
        (128, "nsa", "auto"),
        (128, "dense", "auto"),
    ]
    assert [len(group) for group in groups(found)] == [3, 2]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "sweep is missing; it is the sweeps, in the order in which they are measured"),
        ("sweep = []", "sweep: not a list of tables; write [[sweep]] above each"),
        ("[sweep]\nphase = 'decode'", "sweep: not a list of tables; write [[sweep]] above each"),
        ("[[sweep]]", "sweep[1].phase is missing; it is decode: one token"),
        ("[[sweep]]\nphase = 'train'", "sweep[1].phase: 'train' is unknown; allowed: decode, prefill"),
        ("[[sweep]]\nphase = 'decode'\nrutes = 'auto'", "sweep[1].rutes: unknown key; did you mean routes?"),
        ("[[sweep]]\nphase = 'decode'\nbaseline = 'dense'", "unknown key; did you mean baselines?"),
        ("[shapes]\ndim = 1\n[[sweep]]\nphase = 'decode'", "shapes: unknown key; did you mean shape?"),
        ("[policy]\nbudgets = '9m'", "policy.budgets: unknown key; did you mean budget?"),
        ("[policy]\nrounds = '6'", "policy.rounds: '6' is not a whole number"),
        ("[policy]\nrounds = 0", "policy.rounds: 0 is not allowed; allowed: 1 to 10000"),
        ("[policy]\nrounds = true", "policy.rounds: True is not a whole number"),
        ("[policy]\nsample_ms = '20'", "policy.sample_ms: '20' is not a number"),
        ("[policy]\nsample_ms = 0", "policy.sample_ms: 0 is not allowed; allowed: above 0, up to 60000"),
        ("[policy]\ncache = 'hot'", "policy.cache: 'hot' is unknown; allowed: auto, cold, warm"),
        ("[policy]\nshares = 1", "policy.shares: 1; allowed: true, false"),
        ("[policy]\nbudget = 'soon'", "policy.budget: 'soon' is not a length of time; allowed: 90s, 9m"),
        ("[policy]\nbudget = [1]", "policy.budget: [1] is not a length of time"),
        ("policy = 3", "policy: 3 is not a table of: rounds, "),
        ("tags = ['a b']", "tags: 'a b'; allowed: words of letters"),
        ("tags = []", "tags: an empty list; allowed: words"),
        ("tags = 3", "tags: 3 is neither text nor a list"),
        ("[shape]\ndim = 0", "shape.dim: '0' is too small; it must be at least 1"),
        ("[shape]\ndim = 1.5", "shape.dim: 1.5 is not a size; allowed: 512, '4k', '1k:64k:x2', or a list"),
        ("[shape]\ndim = []", "shape.dim: an empty list; give at least one size"),
        ("[shape]\ndtype = 'fp8'", "shape.dtype: 'fp8' is unknown; allowed: fp64, fp32, fp16, bf16"),
        ("[shape]\ndtype = ['fp32,bf16']", "shape.dtype: 'fp32,bf16' is unknown"),
        ("[shape]\ndevice = 'tpu'", "shape.device: 'tpu'; allowed: auto, cpu, cuda, cuda:N"),
        ("[shape]\nselection = 'overlap=0.96'", "shape.selection: 'overlap=0.96'; allowed: natural, random"),
        ("[[sweep]]\nphase = 'decode'\nS = '4k:1k:x2'", "sweep[1].S: range '4k:1k:x2' runs backwards"),
        ("[[sweep]]\nphase = 'decode'\nS = true", "sweep[1].S: True is not a size"),
        ("[[sweep]]\nphase = 'decode'\nroutes = ''", "sweep[1].routes: an empty route in ''"),
        ("[[sweep]]\nphase = 'decode'\nroutes = ['auto', 'auto']", "sweep[1].routes: 'auto' is given twice"),
        ("[[sweep]]\nphase = 'decode'\nroutes = [1]", "sweep[1].routes: [1] names no routes"),
        (
            "[[sweep]]\nphase = 'decode'\nbaselines = 'sparse'",
            "'sparse' is unknown; known: dense, dense:flash,",
        ),
        (
            "[[sweep]]\nphase = 'decode'\nbaselines = ['none', 'dense']",
            "sweep[1].baselines: 'none,dense'; none goes alone",
        ),
        ("[[sweep]]\nphase = 'decode'\npasses = 'bwd'", "sweep[1].passes: decode has only fwd"),
        ("[[sweep]]\nphase = 'decode'\nmode = 'stepwise'", "sweep[1].mode: decode has only batched"),
        ("[[sweep]]\nphase = 'decode'\nheadline = 'yes'", "sweep[1].headline: 'yes'; allowed: true, false"),
        (
            "[[sweep]]\nphase = 'prefill'\n[[sweep]]\nphase = 'prefill'\nmode = 'chunked=0'",
            "sweep[2].mode: 'chunked=0'; allowed: batched, stepwise or chunked=N",
        ),
        ("[criteria]\nmin_speedup = 2", "criteria.min_speedup: unknown key; did you mean speedup?"),
        ("[criteria]\nmax_failures = -1", "criteria.max_failures: -1 is not allowed; allowed: 0 to "),
        ("[[criteria.speedup]]\nS = 1", "criteria.speedup[1].phase is missing"),
        (
            "[[criteria.speedup]]\nS = 1\nphase = 'decode'\nagainst = 'dense'\nratio = 0",
            "criteria.speedup[1].ratio: 0 is not allowed; allowed: above 0",
        ),
        ("x = ", "not TOML: "),
        ("[[sweep]]\nphase = 'decode'\nS = 1\nS = 2", "not TOML: "),
    ],
)
def test_what_a_suite_must_not_say_is_named_with_its_place(text: str, said: str) -> None:
    with pytest.raises(PlanError) as caught:
        suite_of(text)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_about_is_a_line_and_must_be_there() -> None:
    with pytest.raises(PlanError, match=r"^about is missing; it is what the suite is for, in a line$"):
        parse_suite("[[sweep]]\nphase = 'decode'", name="x")
    with pytest.raises(PlanError, match=r"^about: ' ' is not a line of text"):
        parse_suite("about = ' '\n[[sweep]]\nphase = 'decode'", name="x")


def test_too_many_cells_are_a_slip_of_the_pen() -> None:
    text = "[[sweep]]\nphase = 'decode'\nS = '1:5000:+1'\nB = '1:5000:+1'"
    with pytest.raises(PlanError, match=rf"^sweep\[1\]\.S: .* 25000000 cells, over {MAX_CELLS}$"):
        cells(text)


def test_options_say_what_a_sweep_says() -> None:
    made = Suite.of_options("prefill", {"S": "1k,2k", "baselines": "dense", "dk": "8,16"}, option)
    declared = suite_of("[[sweep]]\nphase = 'prefill'\nS = ['1k', 2048]\nbaselines = ['dense']\ndk = '8, 16'")
    assert cells_of(made, defaults) == cells_of(declared, defaults)
    (part,) = made.resolved()
    assert part.names == {axis: f"--{axis}" for axis in AXES}
    with pytest.raises(PlanError, match=r"^--S: '0' is too small"):
        Suite.of_options("prefill", {"S": "0"}, option)
    with pytest.raises(PlanError, match=r"^--passes: decode has only fwd"):
        Suite.of_options("decode", {"passes": "bwd"}, option)


def test_overrides_replace_an_axis_in_every_sweep_that_has_it() -> None:
    changed = suite_of(TWO + "dk = 8").overridden({"S": "64", "dk": "4", "passes": "bwd"}, option)
    assert [(c.phase, c.passes, c.S, c.dk) for c in cells_of(changed, defaults)] == [
        ("decode", "fwd", 64, 4),
        ("prefill", "bwd", 64, 4),
    ]
    names = [part.names for part in changed.resolved()]
    assert [(n["S"], n["dk"], n["B"]) for n in names] == [
        ("--S", "--dk", "sweep[2].B"),
        ("--S", "--dk", "sweep[1].B"),
    ]
    only_decode = suite_of("[[sweep]]\nphase = 'decode'")
    with pytest.raises(PlanError, match=r"^--mode: no sweep of the suite is a prefill$"):
        only_decode.overridden({"mode": "stepwise"}, option)
    without = suite_of("[[sweep]]\nphase = 'decode'\nbaselines = 'dense'").overridden(
        {"baselines": "none"}, option
    )
    assert {c.impl for c in cells_of(without, defaults)} == {"nsa"}


def test_names_say_where_an_axis_was_given() -> None:
    first, second = suite_of("[shape]\ndk = 8\n" + TWO + "dk = 16").resolved()
    assert (first.number, first.names["dk"], first.names["dim"]) == (2, "sweep[2].dk", "sweep[2].dim")
    assert (second.number, second.names["dk"]) == (1, "shape.dk")


CRITERION = """
[[criteria.speedup]]
S = {S}
phase = "decode"
against = "{against}"
ratio = 2
"""


@pytest.mark.parametrize(
    ("S", "against", "met"),
    [(1024, "dense", True), (1000, "dense", False), (1024, "sdpa", False), (2048, "sdpa", True)],
)
def test_a_criterion_that_nothing_measures_is_named(S: int, against: str, met: bool) -> None:
    text = """
    [[sweep]]
    phase = "decode"
    S = 1024
    baselines = "dense"
    [[sweep]]
    phase = "decode"
    S = 2048
    routes = "auto;sdpa"
    """
    suite = suite_of(text + CRITERION.format(S=S, against=against))
    lines = unmeasured(suite, cells_of(suite, defaults))
    what = f"no sweep measures auto beside {against}, decode fwd of the module at S={S}"
    assert lines == ([] if met else [f"criteria.speedup[1]: {what}"])


def test_a_time_that_nothing_measures_is_named() -> None:
    text = "[[sweep]]\nphase = 'decode'\nS = 1024\n[[criteria.max_ms]]\nS = {}\nphase = 'decode'\nms = 2"
    met, unmet = (suite_of(text.format(size)) for size in (1024, 2048))
    assert unmeasured(met, cells_of(met, defaults)) == []
    what = "criteria.max_ms[1]: no sweep measures auto, decode fwd of the module at S=2048"
    assert unmeasured(unmet, cells_of(unmet, defaults)) == [what]


def test_tags() -> None:
    assert tags_of(["a", "b:c", "a"], "--tag") == ("a", "b:c")
    assert tags_of([], "--tag") == ()
    with pytest.raises(PlanError, match=r"^--tag: 'a b'; allowed: words of letters"):
        tags_of(["a b"], "--tag")
