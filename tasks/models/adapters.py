"""An edit as a LoRA adapter in PEFT's format, written and read without PEFT.

An adapter's B and A are scaled by alpha / r; alpha is set to r, so that B A is the change itself.
"""

from __future__ import annotations

import importlib.util
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from artifacts.errors import ModelError
from tasks.models.anatomy import Experts
from tasks.models.baking import require_writable
from tasks.models.editing import Edit, Place
from tasks.models.exporting import file_errors
from tasks.models.loading import LoadedModel, quiet
from tasks.numerics.low_rank import Factors, change_factors, relative_error

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
ROUNDING = 1e-6  # of factors in float32, relative
_PREFIX = "base_model.model."  # what PEFT puts before a module's path


def has_peft() -> bool:
    """Whether PEFT, and accelerate that it needs, are installed."""
    return all(importlib.util.find_spec(name) is not None for name in ("peft", "accelerate"))


def adapter_of(loaded: LoadedModel, edit: Edit, max_error: float, dtype: str) -> dict[str, Factors]:
    """Factors of every edited module's change, by the module's path in the model.

    Raises:
        ModelError: the edit changes no module, a weight is quantised, or rounding to `dtype` alone
            leaves more than `max_error` (float32's own rounding is let pass).
    """
    if not edit.modules:
        raise ModelError("this trial's edit changes no module: there is nothing to adapt")
    require_writable(loaded.anatomy, edit.modules)
    _refuse_mixtures(loaded, edit)
    paths = module_paths(loaded)
    adapter = {
        paths[place]: change_factors(
            loaded.anatomy.writers[place[0]][place[1]].weight,
            output_edit,
            max_error,
            getattr(torch, dtype),
        )
        for place, (output_edit,) in edit.modules.items()
    }
    error = relative_error(list(adapter.values()))
    if error > max(max_error, ROUNDING):
        raise ModelError(
            f"an adapter in {dtype} has an error {error:.3g} of the change, more than "
            f"{max_error:g}; give --dtype float32 or a larger --max-error"
        )
    return adapter


def _refuse_mixtures(loaded: LoadedModel, edit: Edit) -> None:
    """Experts lie in one tensor, to which no adapter can be attached."""
    for layer, component in edit.modules:
        if isinstance(loaded.anatomy.writers[layer][component], Experts):
            raise ModelError(
                f"layer {layer}, {component}: a mixture's experts lie in one tensor, which no "
                "adapter reaches; export with --as merged"
            )


def module_paths(loaded: LoadedModel) -> dict[Place, str]:
    """The path of every writer's module in the model."""
    names = {id(module): name for name, module in loaded.model.named_modules()}
    return {
        (layer, component): names[id(writer.module)]
        for layer, writers in enumerate(loaded.anatomy.writers)
        for component, writer in writers.items()
    }


def write_adapter(
    adapter: Mapping[str, Factors], folder: Path, base: str, revision: str | None
) -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json`.

    `base` and `revision`: what the configuration calls the model that the adapter belongs to.
    """
    with file_errors():
        save_file(_tensors(adapter), folder / WEIGHTS, metadata={"format": "pt"})
    config = _config({path: factors.rank for path, factors in adapter.items()}, base, revision)
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n")


def _tensors(adapter: Mapping[str, Factors]) -> dict[str, Tensor]:
    return {
        f"{_PREFIX}{path}.lora_{side}.weight": tensor.cpu()
        for path, factors in adapter.items()
        for side, tensor in (("A", factors.a), ("B", factors.b))
    }


def _config(ranks: Mapping[str, int], base: str, revision: str | None) -> dict[str, Any]:
    """The configuration; ranks that differ from the largest are given by module."""
    largest = max(ranks.values())
    own = {path: rank for path, rank in ranks.items() if rank != largest}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": own,
        "alpha_pattern": own,
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }


def require_same_adapter(folder: Path, adapter: Mapping[str, Factors]) -> None:
    """Hold an adapter's file against what was to be written, bit for bit.

    Raises:
        ModelError: they differ.
    """
    written, meant = load_file(folder / WEIGHTS), _tensors(adapter)
    same = written.keys() == meant.keys() and all(
        written[name].dtype == meant[name].dtype and torch.equal(written[name], meant[name])
        for name in meant
    )
    if not same:
        raise ModelError(f"'{WEIGHTS}' does not hold what was to be written")


def attach(loaded: LoadedModel, folder: Path) -> str:
    """Put the adapter of a folder on a loaded model, in place; says by what: "peft" or "weights".

    Without PEFT the adapter's product is added to the weights. Raises ModelError for an adapter
    that does not fit the model.
    """
    if has_peft():
        from peft import PeftModel

        try:
            with quiet(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PEFT and transformers deprecate each other
                PeftModel.from_pretrained(loaded.model, str(folder)).eval()
        except (ValueError, RuntimeError, KeyError) as error:
            raise ModelError(f"PEFT cannot load the adapter: {error}") from error
        return "peft"
    _add_to_weights(loaded, folder)
    return "weights"


def _add_to_weights(loaded: LoadedModel, folder: Path) -> None:
    config = json.loads((folder / CONFIG).read_text())
    tensors = load_file(folder / WEIGHTS)
    with torch.no_grad():
        for path in config["target_modules"]:
            weight: Tensor = loaded.model.get_submodule(path).weight
            a, b = (tensors[f"{_PREFIX}{path}.lora_{side}.weight"] for side in "AB")
            rank = config["rank_pattern"].get(path, config["r"])
            alpha = config["alpha_pattern"].get(path, config["lora_alpha"])
            change = (alpha / rank) * b.float() @ a.float()
            weight.copy_(weight.float() + change.to(weight.device))
