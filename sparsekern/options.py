"""Options: dataclasses that check themselves, shared by functions, config files and the command line.

A field made with :func:`option` carries its default, its help, its unit and its bounds in one place; the command line
prints them and :class:`Options` enforces them.
"""

from __future__ import annotations

import dataclasses
import difflib
import operator
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

Self = TypeVar("Self", bound="Options")

_BOUNDS = {"at_least": operator.ge, "at_most": operator.le, "above": operator.gt, "below": operator.lt}


def option(
    default: Any,
    help: str,
    *,
    unit: str | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: Iterable[str] | None = None,
) -> Any:
    """A dataclass field with its documentation and its bounds. None passes every bound where it is the default.

    `choices` hold for each entry of a list.
    """
    metadata = {
        "help": help,
        "unit": unit,
        "at_least": at_least,
        "at_most": at_most,
        "above": above,
        "below": below,
        "choices": None if choices is None else tuple(choices),
    }
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Base of all option sets; raises ValueError for a value out of bounds."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, rule = getattr(self, field.name), field.metadata
            if value is None and field.default is None:
                continue
            if isinstance(value, float | int) and not isinstance(value, bool):
                for name, holds in _BOUNDS.items():  # NaN fails every bound
                    if rule.get(name) is not None and not holds(value, rule[name]):
                        raise ValueError(f"{field.name} must be {name.replace('_', ' ')} {rule[name]}, got {value}")
            if rule.get("choices"):
                for one in value if isinstance(value, list | tuple) else [value]:
                    if one not in rule["choices"]:
                        raise ValueError(f"{field.name} must be one of {', '.join(rule['choices'])}, got {one!r}")

    @classmethod
    def names(cls) -> list[str]:
        """Names of all options, in order of declaration."""
        return [field.name for field in dataclasses.fields(cls)]

    @classmethod
    def check_name(cls, name: str) -> None:
        """Raise ValueError for an unknown option, naming the nearest known one."""
        if name not in cls.names():
            close = difflib.get_close_matches(name, cls.names(), n=1, cutoff=0.5)
            hint = f"did you mean {close[0]!r}?" if close else f"known options: {', '.join(cls.names())}"
            raise ValueError(f"unknown option {name!r}; {hint}")

    @classmethod
    def of(cls: type[Self], options: Mapping[str, Any]) -> Self:
        """Build from a mapping of known names."""
        for name in options:
            cls.check_name(name)
        return cls(**options)

    def to_dict(self) -> dict[str, Any]:
        """All options by name."""
        return dataclasses.asdict(self)
