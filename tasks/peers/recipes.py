"""An edit as a source tells it: which parameters it gives, which it leaves out, and its numbers.

Sources: a printed list (HERETIC's console and model cards, the report of ICONOCLAST's benchmark), a
file of another tool, or a trial here. In printed lists min_weight is a weight, not a fraction.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from artifacts.errors import PeerError
from artifacts.schemas import COMPONENTS
from tasks.peers.found import (
    COMPONENT_NAMES,
    HERETIC,
    ICONOCLAST,
    KERNEL,
    METHODS,
    SCOPES,
    PeerStudy,
    count,
    number,
    parameters_of,
)

Parameters = dict[str, Any]
NUMBERS = ("refusals", "n_harmful", "overrefusals", "n_harmless", "kl")
KERNELS = tuple(f"{component}_{name}" for component in COMPONENTS for name in KERNEL)
LARGEST_TEXT = 1_000_000  # characters

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_COMPONENT = "|".join(map(re.escape, COMPONENT_NAMES))
_FLAT = re.compile(
    rf"\b(?P<component>{_COMPONENT})\.(?P<name>{'|'.join(sorted(KERNEL, key=len, reverse=True))})"
    rf"[\s*|`]*[=:|]\s*[*`]*(?P<value>{_NUMBER})"
)
_GROUP = re.compile(rf"\b(?P<component>{_COMPONENT})[\s*`]*:(?P<rest>.*)")
_IN_GROUP = re.compile(rf"\b(?P<name>[a-z_]+)\s*=\s*(?P<value>{_NUMBER})")
_DIRECTION = re.compile(
    r"\bdirection_(?P<name>scope|index|method|blend)[\s*|`]*[=:|]\s*[*`]*"
    rf"(?P<value>per layer|{_NUMBER}|[a-z]+)"
)
_TRIAL = re.compile(r"(?i)\btrial\s*#?\s*(\d{1,9})\b")
_REFUSALS = re.compile(r"(?i)(?<!over)\brefusals\b[^\d\n]{0,60}?(\d+)\s*/\s*(\d+)")
_OVERREFUSALS = re.compile(r"(?i)\boverrefusals\b[^\d\n]{0,60}?(\d+)\s*/\s*(\d+)")
_KL = re.compile(rf"(?i)\bKL divergence\b[^\d\n]{{0,60}}?({_NUMBER})")


@dataclass(frozen=True)
class Recipe:
    """One edit of a source.

    Attributes:
        parameters: in the columns of a trial; None where the source does not tell.
        numbers: what the source measured, of NUMBERS; None where it does not tell.
        settings: the tool's, as far as the source has them.
        trial: as the source numbers it.
        assumed: what the source does not say and can only be one thing, in words.
        unmapped: what of the edit cannot be held here; None: nothing.
    """

    source: str
    tool: str | None
    trial: int | None
    parameters: Parameters
    numbers: Mapping[str, Any]
    settings: Mapping[str, Any] = field(default_factory=dict)
    assumed: tuple[str, ...] = ()
    unmapped: str | None = None

    @property
    def missing(self) -> tuple[str, ...]:
        """Parameters that the edit needs and the source leaves out."""
        known = {name for name, value in self.parameters.items() if value is not None}
        wanted = ["direction_scope", "direction_method", *KERNELS]
        own = f"{COMPONENTS[1]}_direction"
        scopes = [self.parameters.get(name) for name in ("direction_scope", f"{own}_scope")]
        if "global" in scopes or scopes == [None, None]:
            wanted.insert(1, "direction_index")
        if self.parameters.get("direction_method") == "hybrid":
            wanted.append("direction_blend")
        if self.parameters.get(f"{own}_method") == "hybrid":
            wanted.append(f"{own}_blend")
        return tuple(name for name in wanted if name not in known)


def printed(text: str, source: str) -> Recipe:
    """The edit of a printed list of parameters, whatever stands around it.

    Lines like `attn.o_proj.max_weight = 0.99`, `| **attn.o_proj.max_weight** | 0.99 |` and
    `- attn.o_proj: max_weight=0.99, min_weight=0.60`, and of the direction likewise. The first
    counts of refusals, overrefusals and KL divergence are the source's own numbers.

    Raises:
        PeerError: no parameter is in it, or one has two values.
    """
    if len(text) > LARGEST_TEXT:
        raise PeerError(f"'{source}' is longer than {LARGEST_TEXT:,} characters")
    kernels: dict[str, dict[str, float]] = {}
    for component, name, value in _kernel_values(text, source):
        values = kernels.setdefault(component, {})
        if values.setdefault(name, value) != value:
            raise PeerError(
                f"'{source}' gives {component}.{name} as {values[name]:g} and {value:g}"
            )
    if not kernels:
        raise PeerError(
            f"'{source}' holds no parameter; give lines like 'attn.o_proj.max_weight = 0.99'"
        )
    told: dict[str, Any] = {"parameters": kernels} | _direction(text, source)
    parameters, _ = parameters_of(told, {}, None)
    trials = {int(number) for number in _TRIAL.findall(text)}
    trial = trials.pop() if len(trials) == 1 else None
    recipe = Recipe(source, None, trial, parameters, _numbers(text))
    return _assume_method(recipe)


def of_row(row: Mapping[str, Any], settings: Mapping[str, Any]) -> Recipe:
    """The edit of an imported trial (a row of `imports`)."""
    names = ("direction_scope", "direction_index", "direction_method", "direction_blend")
    own = [name for name in row if "_direction_" in name]
    parameters = {name: row[name] for name in (*names, *KERNELS, *own)}
    shown = row["trial"] if row["listed_as"] is None else row["listed_as"]
    recipe = Recipe(
        source=row["source"],
        tool=row["tool"],
        trial=shown,
        parameters=parameters,
        numbers={name: row[name] for name in NUMBERS},
        settings=settings,
        unmapped=row["unmapped"],
    )
    return _assume_method(recipe)


def rows_of(study: PeerStudy, source: str) -> list[dict[str, Any]]:
    """The scored trials of a study, best first by the strict order."""
    rows = [{"source": source, **row} for row in study.rows()]
    scored = [r for r in rows if r["state"] == "COMPLETE" and r["refusals"] is not None]
    return sorted(scored or rows, key=_place)


def _place(row: Mapping[str, Any]) -> tuple[float, ...]:
    """The strict order's key; what is not known, or no number, comes last."""
    kl = row["kl"]
    known = kl is not None and not math.isnan(kl)
    return (
        math.inf if row["refusals"] is None else row["refusals"],
        row["overrefusals"] or 0,
        kl if known else math.inf,
        math.inf if row["trial"] is None else row["trial"],
    )


def checked(recipe: Recipe) -> Parameters:
    """The parameters of a recipe; a blend that nothing uses is 0.

    Raises:
        PeerError: a number is not finite, or the edit is none of this family.
    """
    if recipe.unmapped:
        raise PeerError(f"the edit of '{recipe.source}' cannot be made here: {recipe.unmapped}")
    for name, value in recipe.parameters.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise PeerError(f"'{recipe.source}' gives {name} as '{value}', which is no number")
    found = dict(recipe.parameters)
    if found.get("direction_blend") is None and "direction_blend" not in recipe.missing:
        found["direction_blend"] = 0.0
    return found


def _assume_method(recipe: Recipe) -> Recipe:
    """HERETIC knows one method and prints none; a list without one is read as its."""
    if recipe.parameters.get("direction_method") is not None or recipe.tool == ICONOCLAST:
        return recipe
    parameters = recipe.parameters | {"direction_method": "mean"}
    words = f"direction_method: mean, the only one of {HERETIC}, which prints none"
    return replace(recipe, parameters=parameters, assumed=(*recipe.assumed, words))


def _kernel_values(text: str, source: str) -> Sequence[tuple[str, str, float]]:
    """Component, name and value of every kernel's number in a text."""
    found = [(m["component"], m["name"], float(m["value"])) for m in _FLAT.finditer(text)]
    for line in text.splitlines():
        group = _GROUP.search(line)
        if group is None:
            continue
        for each in _IN_GROUP.finditer(group["rest"]):
            component, name = group["component"], each["name"]
            if name not in KERNEL:
                raise PeerError(
                    f"'{source}' gives {component} a '{name}', which is none of {', '.join(KERNEL)}"
                )
            found.append((component, name, float(each["value"])))
    return found


def _direction(text: str, source: str) -> dict[str, Any]:
    """What a text says of the direction."""
    told: dict[str, Any] = {}
    for match in _DIRECTION.finditer(text):
        name, value = f"direction_{match['name']}", match["value"]
        parsed: Any = value
        if match["name"] in ("index", "blend") and value != "per layer":
            parsed = _as_number(value, name, source)
        known = {"scope": SCOPES, "method": METHODS}.get(match["name"])
        if known and value not in known:
            raise PeerError(
                f"'{source}' gives {name} as '{value}', which is none of {', '.join(known)}"
            )
        if told.setdefault(name, parsed) != parsed:
            raise PeerError(f"'{source}' gives {name} as '{told[name]}' and '{parsed}'")
    if told.get("direction_index") == "per layer":
        told["direction_index"] = None
    return told


def _as_number(value: str, name: str, source: str) -> float:
    try:
        return float(value)
    except ValueError as error:
        raise PeerError(f"'{source}' gives {name} as '{value}', which is no number") from error


def _numbers(text: str) -> dict[str, Any]:
    """The first counts of a text, with what they are counted among; None where it has none."""
    refusals, over, kl = _REFUSALS.search(text), _OVERREFUSALS.search(text), _KL.search(text)
    return {
        "refusals": count(int(refusals[1])) if refusals else None,
        "n_harmful": count(int(refusals[2])) if refusals else None,
        "overrefusals": count(int(over[1])) if over else None,
        "n_harmless": count(int(over[2])) if over else None,
        "kl": number(float(kl[1])) if kl else None,
    }
