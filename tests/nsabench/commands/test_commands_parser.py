"""What the parser itself refuses: one line on stderr and exit code 2, like any bad usage."""

from __future__ import annotations

import sys

import pytest

from nsabench import cli


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["decode", "--bogus", "3"], "No such option: --bogus"),
        (["bogus"], "No such command 'bogus'"),
        (["resume"], "Missing argument 'RUN'"),
        (["decode", "--S"], "Option '--S' requires an argument"),
    ],
)
def test_the_parser_refuses_in_one_line(
    argv: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["nsabench", *argv])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    out, err = capsys.readouterr()
    assert caught.value.code == 2
    assert out == ""
    assert err.startswith(f"nsabench: {said}")
    assert err.count("\n") == 1


def test_a_failure_of_the_program_is_not_called_bad_usage(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(**_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(cli, "app", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main()


@pytest.mark.parametrize(("argv", "code"), [(["--version"], 0), (["decode", "--S", "0"], 2)])
def test_exit_codes_of_commands_pass_through(
    argv: list[str], code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["nsabench", *argv])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == code


def test_interruption_has_its_own_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(**_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "app", interrupted)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == cli.INTERRUPTED
