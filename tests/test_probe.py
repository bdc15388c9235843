"""The model that a process keeps: never two on a device."""

from __future__ import annotations

import weakref
from typing import Any

import pytest

from artifacts.specs import ModelSpec
from artifacts.store import Store
from tasks import probe
from tasks.stage import Runtime, running


class Model:
    """Stands for a loaded model; it can be watched."""


def test_a_model_is_let_go_of_before_another_is_loaded(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[weakref.ref[Model]] = []
    alive: list[int] = []

    def load(*_: Any) -> Model:
        alive.append(sum(reference() is not None for reference in loaded))
        model = Model()
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(probe, "_open", {})
    monkeypatch.setattr(probe, "_load", load)
    spec = ModelSpec(id="organism")
    with running(Runtime(store)):
        for dtypes in (["float32"], ["float32"], ["bfloat16"], ["float32"]):
            probe.open_model(spec, dtypes)
    assert alive == [0, 0, 0]  # the second call met the model of the first
