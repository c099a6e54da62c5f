"""What every command shares: where to print, and how an error becomes one line and an exit code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console

from nsabench.plan import PlanError
from nsabench.store import DiskError, SchemaError, StoreError

GOOD, CHECK_FAILED, BAD_USAGE, INCONCLUSIVE, MACHINE_FAILED = range(5)
INTERRUPTED = 130


def console(*, stderr: bool = False) -> Console:
    """A console for the present streams; colour follows the terminal and NO_COLOR."""
    return Console(stderr=stderr, highlight=False)


def complain(message: str) -> None:
    """One line on stderr."""
    console(stderr=True).print(f"nsabench: {' '.join(message.split())}", soft_wrap=True, markup=False)


def fail(message: str, code: int = BAD_USAGE) -> typer.Exit:
    """Complain; raise what is returned."""
    complain(message)
    return typer.Exit(code)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Bad usage ends in one line and exit code 2, a refusing disk in exit code 4; Ctrl-C in 130."""
    # Imported late: it brings pandas with it, which --help need not wait for.
    from nsabench.present.frame import PresentError

    try:
        yield
    except DiskError as error:
        raise fail(str(error), MACHINE_FAILED) from None
    except (PlanError, StoreError, SchemaError, PresentError) as error:
        raise fail(str(error)) from None
    except KeyboardInterrupt:
        raise fail("interrupted", INTERRUPTED) from None
