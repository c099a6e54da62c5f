"""Commands that take their options as a few dataclasses: the parser sees every field as an option."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from copy import copy
from dataclasses import fields, is_dataclass
from typing import Annotated, Any, get_args, get_origin, get_type_hints

Command = Callable[..., None]


def flat(command: Command, *, show_defaults: bool = True) -> Command:
    """``command`` with each parameter that is a dataclass replaced by that dataclass's fields.

    ``show_defaults=False`` leaves the defaults out of ``--help``, for options that replace something else's
    values.
    """
    hints = get_type_hints(command, include_extras=True)
    parameters: list[inspect.Parameter] = []
    built: dict[str, tuple[type, list[str]]] = {}
    for name, given in inspect.signature(command).parameters.items():
        hint = hints[name]
        if not is_dataclass(hint):
            parameters.append(given.replace(annotation=hint, kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        assert isinstance(hint, type)
        inner = get_type_hints(hint, include_extras=True)
        built[name] = hint, [one.name for one in fields(hint)]
        parameters += [
            inspect.Parameter(
                one.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=one.default,
                annotation=inner[one.name] if show_defaults else _silent(inner[one.name]),
            )
            for one in fields(hint)
        ]

    def run(**given: Any) -> None:
        parts = {name: kind(**{n: given.pop(n) for n in names}) for name, (kind, names) in built.items()}
        command(**parts, **given)

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {one.name: one.annotation for one in parameters}
    return run


def _silent(hint: Any) -> Any:
    if get_origin(hint) is not Annotated:
        return hint
    kind, option = get_args(hint)
    quiet = copy(option)
    quiet.show_default = False
    return Annotated[kind, quiet]
