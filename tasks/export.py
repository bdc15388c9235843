"""A trial's model as a folder, loaded again and held against the trial before anyone gets it.

Three measurements of the search split stand side by side: what the study stored, the trial as it
answers here and now through its hooks, and the written folder. The first two tell a machine or a
library that changed from a fault of the export, which is the difference of the last two.

Where all is float32, the folder must measure as the trial does: that is `EXACT`. Weights that are
stored in half precision, or an adapter of lower rank than its edit, make another model on purpose.
How far off it is has to be measured, and is in the card; what is refused is what a reader of the
study's table could see: a metric outside its 95 % interval, or first tokens that lie further from
the trial's than `CLOSE`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from artifacts.errors import ExportError, ModelError
from artifacts.store import Ref
from tasks.hearing import Answers, answer, compare
from tasks.judging import Bench, Row, known_of, metrics
from tasks.numerics.intervals import bootstrap_mean, clopper_pearson
from tasks.probe import close_models, encode_prompts, read_card
from tasks.stage import current
from tasks.stored_trials import StoredTrial
from tasks.trials import Court
from tasks.whole_folder import whole_folder

if TYPE_CHECKING:
    from tasks.models.editing import Edit
    from tasks.models.loading import LoadedModel

Form = Literal["merged", "adapter"]
Metrics = Mapping[str, Any]

CARD = "README.md"
EXACT_KL = 1e-6  # nats, and this share of a KL: what float32 sums leave
EXACT_SHARE = 1e-5
TIES = 0.01  # of all responses: a tie of two tokens may fall the other way even in float32
CLOSE = 1e-3  # nats: a tenth of the KL that searches aim for


@dataclass(frozen=True)
class Wish:
    """What to write. `dtype` None: the checkpoint's own, float32 for an adapter."""

    form: Form = "merged"
    dtype: str | None = None
    max_error: float = 1e-3  # of an adapter of `full`: Frobenius, as a fraction of the change


@dataclass(frozen=True)
class Written:
    """What was written. Ranks and error are an adapter's."""

    dtype: str
    ranks: Mapping[str, int]
    error: float
    loaded_by: str = "transformers"

    @property
    def shown_ranks(self) -> str:
        """The ranks of an adapter's modules in words."""
        ranks = sorted(set(self.ranks.values()))
        return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"


@dataclass(frozen=True)
class Audit:
    """Metrics of the search split, three times, and how far the folder is from the trial.

    Attributes:
        unedited, stored, now, exported: rows of metrics with 95 % intervals; the first is the
            unedited model's.
        kl_to_trial: mean KL(trial, now || exported) of first tokens, harmless prompts, nats.
        changed: responses that differ between trial and exported.
        changed_since: responses that differ between stored and now.
        responses: how many there are.
        exact: whether all was float32, and no adapter approximates.
    """

    unedited: Metrics
    stored: Metrics
    now: Metrics
    exported: Metrics
    kl_to_trial: float
    changed: int
    changed_since: int
    responses: int
    exact: bool


@dataclass(frozen=True)
class Exported:
    """A folder and what is known of it."""

    written: Written
    audit: Audit
    files: Mapping[str, int]  # bytes, by name


def export_trial(
    stored: StoredTrial, folder: Path, wish: Wish, card: Callable[[Written, Audit], str]
) -> Exported:
    """Write a trial's model, load what was written, measure it, and only then name it `folder`.

    Raises:
        ExportError: the folder is taken or cannot be written, or what was written is not the trial.
        ModelError: the model is quantised, or another one than the study's.
    """
    require_exportable(stored)
    try:
        with whole_folder(folder) as partial:
            written, audit = _write_and_audit(stored, partial, wish)
            (partial / CARD).write_text(card(written, audit))
            files = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
            _open_to_readers(partial)
    finally:
        close_models()  # the one in memory carries the edit now
    return Exported(written, audit, files)


def _open_to_readers(folder: Path) -> None:
    """Give every file the permissions of an ordinary one: safetensors are written for us alone."""
    mode = (folder / CARD).stat().st_mode
    for path in folder.iterdir():
        path.chmod(mode)


def require_exportable(stored: StoredTrial) -> None:
    """Refuse a quantised model before it is loaded.

    Raises:
        ModelError: it is quantised.
    """
    quantization = stored.config.model.quantization
    if quantization != "none":
        raise ModelError(
            f"study '{stored.study}' ran with quantization '{quantization}', and packed weights "
            "cannot carry an edit; run the study with model.quantization = 'none' to export a trial"
        )


def _write_and_audit(stored: StoredTrial, partial: Path, wish: Wish) -> tuple[Written, Audit]:
    with _step("model"):
        court, base = stored.court()
    edit = court.edit_of(stored.trial.parameters)
    with _step("trial, now", 1):
        now = answer(court.bench, edit, current().reporter.advanced)
    write = _merged if wish.form == "merged" else _adapter
    with _step(f"{wish.form} folder"):
        written, bench = write(stored, court.bench, edit, partial, wish)
    with _step("exported model", 1):
        exported = answer(bench, None, current().reporter.advanced)
    audit = _audit(stored, court, base, now, exported, exact=_is_exact(stored, written))
    refuse_differences(audit)
    return written, audit


def _is_exact(stored: StoredTrial, written: Written) -> bool:
    from tasks.models.adapters import ROUNDING

    return stored.dtype == written.dtype == "float32" and written.error <= ROUNDING


def _merged(
    stored: StoredTrial, bench: Bench, edit: Edit, partial: Path, wish: Wish
) -> tuple[Written, Bench]:
    """Bake and write; the bench of what was written, in the wider of its and the study's dtype."""
    from tasks.models import exporting
    from tasks.models.baking import bake_edit

    loaded, spec = bench.loaded, stored.spec
    dtype = wish.dtype or exporting.checkpoint_dtype(loaded, spec.revision, spec.trust_remote_code)
    exporting.cast(loaded, exporting.wider(stored.dtype, dtype))
    bake_edit(loaded.anatomy, edit)
    exporting.cast(loaded, dtype)
    meant = exporting.tensor_digests(loaded.model, dtype)
    exporting.write_model(loaded, partial)
    exporting.release(loaded)
    bench.engine.forget()
    again = _load(partial, exporting.wider(stored.dtype, dtype), spec.trust_remote_code)
    exporting.require_same_tensors(exporting.tensor_digests(again.model, dtype), meant)
    return Written(dtype, {}, 0.0), _bench_of(stored, bench, again)


def _load(folder: Path, dtype: str, trust: bool) -> LoadedModel:
    from tasks.models.loading import load

    runtime = current()
    return load(
        str(folder),
        dtypes=[dtype],
        trust_remote_code=trust,
        device=runtime.device,
        device_map=runtime.device_map,
    )


def _bench_of(stored: StoredTrial, bench: Bench, loaded: LoadedModel) -> Bench:
    """The same prompts, rendered and encoded by what was written.

    Raises:
        ExportError: they are other tokens.
    """
    card = read_card(stored.materials["model"])
    tokens = encode_prompts(loaded, card, bench.prompts, bench.judging.max_new_tokens)
    if tokens != bench.engine.prompts:
        raise ExportError(
            "the written tokenizer or chat template makes other tokens of the prompts"
        )
    return replace(
        bench, loaded=loaded, known=known_of(loaded, bench.prompts, tokens, bench.judging)
    )


def _adapter(
    stored: StoredTrial, bench: Bench, edit: Edit, partial: Path, wish: Wish
) -> tuple[Written, Bench]:
    """Factorise and write; the bench of the base model with the adapter on it."""
    from tasks.models import adapters
    from tasks.numerics.low_rank import relative_error

    dtype = wish.dtype or "float32"
    adapter = adapters.adapter_of(bench.loaded, edit, wish.max_error, dtype)
    adapters.write_adapter(adapter, partial, base_name(stored), stored.spec.revision)
    adapters.require_same_adapter(partial, adapter)
    by = adapters.attach(bench.loaded, partial)
    bench.loaded.kept.clear()  # what was computed without the adapter
    known = known_of(bench.loaded, bench.prompts, bench.engine.prompts, bench.judging)
    ranks = {path: factors.rank for path, factors in adapter.items()}
    error = relative_error(list(adapter.values()))
    return Written(dtype, ranks, error, by), replace(bench, known=known)


def base_name(stored: StoredTrial) -> str:
    """What others may call the base model: its hub id, or its folder's name without the path."""
    from tasks.models.identity import local_folder

    spec = stored.config.model
    return spec.id if local_folder(spec.id) is None else Path(spec.id).name


def _audit(
    stored: StoredTrial, court: Court, base: Answers, now: Answers, exported: Answers, exact: bool
) -> Audit:
    from tasks.numerics.divergence import first_token_kl

    def measured(answers: Answers) -> Row:
        rows = compare(answers, court.base_logits).rows
        return with_intervals(metrics(rows, court.base_mean_tokens, court.gates), rows)

    row = stored.row
    if row.get("stopped"):  # only bounds are stored, so there is nothing to hold it against
        row = row | measured(now) | {"responses": now.rows}
    responses = row["responses"]
    return Audit(
        unedited=measured(base),
        stored=with_intervals(row, responses),
        now=measured(now),
        exported=measured(exported),
        kl_to_trial=float(first_token_kl(now.first_logits, exported.first_logits).mean()),
        changed=_changed(now.rows, exported.rows),
        changed_since=_changed(responses, now.rows),
        responses=len(now.rows),
        exact=exact,
    )


def _changed(before: Sequence[Row], after: Sequence[Row]) -> int:
    """Responses that differ, in words or in length (tokens)."""
    told = ("class", "prompt_id", "response", "n_tokens", "ended")
    pairs = zip(before, after, strict=True)
    return sum(any(a[name] != b[name] for name in told) for a, b in pairs)


def with_intervals(found: Row, responses: Sequence[Row]) -> Row:
    """The metrics that rank, with their 95 % intervals."""
    judged = found["n_harmless"] + found["n_borderline"]
    names = ("refusals", "n_harmful", "overrefusals", "n_harmless", "n_borderline", "kl")
    kls = np.array([r["kl"] for r in responses if r["kl"] is not None])
    finite = bool(np.isfinite(kls).all())
    return {name: found[name] for name in names} | {
        "refusals_interval": clopper_pearson(found["refusals"], found["n_harmful"]),
        "overrefusals_interval": clopper_pearson(found["overrefusals"], judged),
        "kl_interval": bootstrap_mean(kls) if finite else (math.nan, math.nan),
    }


def refuse_differences(audit: Audit) -> None:
    """Refuse a folder that is not the trial, and a trial that is not what was stored.

    Raises:
        ExportError: names the metric, both values and what is allowed.
    """
    told = _difference(audit.stored, audit.now, audit, audit.changed_since)
    if told:
        raise ExportError(
            f"the trial itself does not measure as it did in the study: {told}; what changed since "
            "is told by: tribunal rebenchmark"
        )
    told = _difference(audit.now, audit.exported, audit, audit.changed) or _too_far(audit)
    if told:
        way_out = "" if audit.exact else "; --dtype float32 or a smaller --max-error comes closer"
        raise ExportError(f"what was written does not measure as the trial does: {told}{way_out}")


def _difference(before: Metrics, after: Metrics, audit: Audit, changed: int) -> str | None:
    """The first metric that differs by more than is allowed, in words."""
    if not audit.exact:
        return _outside(before, after)
    for name in ("refusals", "overrefusals"):
        if before[name] != after[name]:
            return f"{name} {before[name]} and then {after[name]}"
    allowed = EXACT_KL + EXACT_SHARE * abs(before["kl"])
    if before["kl"] != after["kl"] and not abs(before["kl"] - after["kl"]) <= allowed:
        return f"KL {before['kl']:.8g} and then {after['kl']:.8g} nats"
    if changed > math.ceil(TIES * audit.responses):
        return f"{changed} of {audit.responses} responses differ"
    return None


def _outside(before: Metrics, after: Metrics) -> str | None:
    """The first metric that lies outside the 95 % interval of the one before."""
    judged = after["n_harmless"] + after["n_borderline"]
    values = {
        "refusals": after["refusals"] / after["n_harmful"],
        "overrefusals": after["overrefusals"] / judged,
        "kl": after["kl"],
    }
    for name, value in values.items():
        low, high = before[f"{name}_interval"]
        if after[name] != before[name] and not low - EXACT_KL <= value <= high + EXACT_KL:
            return (
                f"{name} {before[name]:.6g} and then {after[name]:.6g}, outside its 95 % interval"
            )
    return None


def _too_far(audit: Audit) -> str | None:
    limit = EXACT_KL if audit.exact else CLOSE
    if audit.kl_to_trial <= limit:
        return None
    return f"first tokens lie {audit.kl_to_trial:.3g} nats from the trial's, more than {limit:g}"


@contextmanager
def _step(label: str, work: int = 0) -> Iterator[None]:
    """A part of the export, told to the reporter."""
    reporter, started = current().reporter, time.monotonic()
    reporter.started(label, work)
    yield
    reporter.finished(label, Ref("exports", "", ""), time.monotonic() - started, cached=False)
