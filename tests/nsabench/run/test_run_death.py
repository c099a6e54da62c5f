"""What a dead worker left is read rightly: its code, its dump, its last words, the kernel's counter."""

from __future__ import annotations

from pathlib import Path

import pytest

from nsabench.run.death import cause, last_words, oom_kills, whereabouts

SEGFAULT = """\
allocating
Fatal Python error: Segmentation fault

Thread 0x00007f1 (most recent call first):
  File "/usr/lib/python3.11/threading.py", line 10 in watch

Current thread 0x00007f2 (most recent call first):
  File "~/nsa/backends/sdpa.py", line 88 in selected_attention
  File "~/nsa/module.py", line 12 in forward

Extension modules: numpy (total: 1)
"""
HANG = SEGFAULT[SEGFAULT.index("Thread") :]


@pytest.mark.parametrize(
    ("code", "printed", "killed_for_memory", "expected"),
    [
        (-9, "", True, ("oom", "the kernel killed the worker: out of memory")),
        (-9, "", False, ("error", "the worker was killed by SIGKILL")),
        (-11, "", True, ("error", "the worker was killed by SIGSEGV")),
        (-63, "", False, ("error", "the worker was killed by signal 63")),
        (0, "", False, ("error", "the worker ended with exit code 0")),
        (2, "a\nb \n\n", False, ("error", "the worker ended with exit code 2; it last printed: b")),
        (
            -11,
            SEGFAULT,
            False,
            (
                "error",
                "the worker was killed by SIGSEGV at backends/sdpa.py:88 in selected_attention; "
                "it last printed: allocating",
            ),
        ),
    ],
)
def test_causes(code: int, printed: str, killed_for_memory: bool, expected: tuple[str, str]) -> None:
    assert cause(code, printed, killed_for_memory=killed_for_memory) == expected


def test_the_last_dump_counts_and_its_own_thread() -> None:
    assert whereabouts(HANG) == " at backends/sdpa.py:88 in selected_attention"
    assert whereabouts(SEGFAULT + HANG.replace("88 in selected", "99 in sliding")) == (
        " at backends/sdpa.py:99 in sliding_attention"
    )
    assert whereabouts("File nothing") == whereabouts("") == ""


def test_last_words_are_short_and_from_before_the_dump() -> None:
    assert last_words("first\nsecond\n" + HANG) == "second"
    assert last_words(HANG) == last_words("") == last_words(" \n") == ""
    assert last_words("x" * 500) == "x" * 200 + "…"


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_the_kernels_counter_is_found_nearest_first(tmp_path: Path) -> None:
    assert oom_kills(tmp_path) is None
    write(tmp_path / "proc/vmstat", "pgfault 1\noom_kill 40\n")
    assert oom_kills(tmp_path) == 40
    write(tmp_path / "sys/fs/cgroup/memory/memory.oom_control", "under_oom 0\noom_kill 30\n")
    assert oom_kills(tmp_path) == 30
    write(tmp_path / "proc/self/cgroup", "4:cpu,memory:/a/b\n0::/c\n")
    write(tmp_path / "sys/fs/cgroup/memory/a/b/memory.oom_control", "oom_kill_disable 0\noom_kill 20\n")
    assert oom_kills(tmp_path) == 20
    write(tmp_path / "proc/self/cgroup", "0::/c\n")
    write(tmp_path / "sys/fs/cgroup/c/memory.events", "oom 3\noom_kill 10\noom_group_kill 1\n")
    assert oom_kills(tmp_path) == 10
