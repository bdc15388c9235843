"""A stored trial with everything that made it: enough to put its edit on the model again."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

import polars as pl

from artifacts.errors import ModelError
from artifacts.specs import Config, ModelSpec
from artifacts.store import Manifest, Ref, Store
from tasks.hearing import Answers
from tasks.models.identity import local_folder
from tasks.probe import model_identity
from tasks.remeasure import input_of, prompts_of
from tasks.trials import Court, Trial, open_court, trial_of

Row = dict[str, Any]
Validate = Callable[[dict[str, Any], str], Config]


@dataclass(frozen=True)
class StoredTrial:
    """One trial of a study's search, as it was judged.

    Attributes:
        row: of the trial table, responses included.
        model: the probed model's row: identity, dtype, prefix.
        made: when and with which versions its generation was judged.
    """

    study: str
    config: Config
    protocol: Ref
    materials: Mapping[str, Ref]
    prompts: Mapping[str, Ref]
    row: Row
    model: Row
    made: Mapping[str, Any]

    @property
    def trial(self) -> Trial:
        return trial_of(self.row)

    @property
    def dtype(self) -> str:
        """The precision that it was judged in."""
        return str(self.model["dtype"])

    @cached_property
    def spec(self) -> ModelSpec:
        """The model's spec, pinned to what was measured.

        Raises:
            ModelError: a folder holds another model by now.
        """
        spec, measured = self.config.model, str(self.model["identity"])
        if local_folder(spec.id) is None:
            return spec.model_copy(update={"revision": measured.rpartition("@")[2]})
        identity: Any = model_identity(spec)
        if identity["content"] != measured:
            raise ModelError(
                f"the model in '{spec.id}' is not the one that study '{self.study}' measured; put "
                "that one back, or run the study anew"
            )
        return spec

    def court(self) -> tuple[Court, Answers]:
        """The court that judged it, with the model loaded, and the unedited model's answers."""
        config = self.config.model_copy(update={"model": self.spec})
        return open_court("search", config, self.protocol, self.materials, self.prompts)


def stored_trial(store: Store, study: str, number: int, validate: Validate) -> StoredTrial:
    """A trial of a study that has it.

    Args:
        validate: makes a config of its stored tree and its study's name.

    Raises:
        ModelError: the study's own artifacts are gone.
    """
    named = next((m for m in store.manifests("studies") if _name(store, m) == study), None)
    if named is None:
        raise ModelError(f"no study '{study}'")
    protocol = input_of(named, "protocol")
    for generation in chain(store.manifests("finals"), store.manifests("generations")):
        if generation.inputs["protocol"]["key"] != protocol.key:
            continue
        rows = store.read(generation.ref).filter(pl.col("trial") == number).to_dicts()
        if rows:
            tree = json.loads(store.read(named.ref, ["config"])["config"][0])
            return _of(store, study, validate(tree, study), generation, rows[0])
    raise ModelError(f"no trial '{number}' in study '{study}'")


def _name(store: Store, named: Manifest) -> str:
    return str(store.read(named.ref, ["study"])["study"][0])


def _of(store: Store, study: str, config: Config, generation: Manifest, row: Row) -> StoredTrial:
    roles = ("model", "directions", "baseline")
    materials = {role: input_of(generation, f"materials.{role}") for role in roles}
    return StoredTrial(
        study=study,
        config=config,
        protocol=input_of(generation, "protocol"),
        materials=materials,
        prompts=prompts_of(generation),
        row=row,
        model=store.read(materials["model"]).row(0, named=True),
        made=generation.provenance,
    )
