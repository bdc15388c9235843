"""The model card of an export: what it is, every parameter, every measurement, how to repeat it.

Nothing of the machine is in it: a folder is told by its name, without the path to it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from artifacts.schemas import PARAMETERS
from artifacts.specs import Config
from tasks.export import CLOSE, Audit, Form, Written, base_name
from tasks.models.identity import local_folder
from tasks.stored_trials import StoredTrial

Row = Mapping[str, Any]
_HEAD = (
    "| split | refusals | overrefusals | KL, nats |",
    "|---|---|---|---|",
)


def model_card(
    stored: StoredTrial, form: Form, written: Written, audit: Audit, splits: Sequence[Row]
) -> str:
    """The README.md of an export, Markdown with the hub's front matter.

    Args:
        splits: the trial's rows in the study, with 95 % intervals, search first.
    """
    parts = (
        _front_matter(stored, form),
        _introduction(stored, form, written),
        _use(stored, form),
        _measured(audit, splits),
        _parameters(stored),
        _protocol(stored, form),
    )
    return "\n".join(line for part in parts for line in part) + "\n"


def _front_matter(stored: StoredTrial, form: Form) -> Iterator[str]:
    adapter = form == "adapter"
    yield "---"
    if local_folder(stored.config.model.id) is None:
        yield f"base_model: {json.dumps(base_name(stored))}"
        yield f"base_model_relation: {'adapter' if adapter else 'finetune'}"
    yield f"library_name: {'peft' if adapter else 'transformers'}"
    yield "pipeline_tag: text-generation"
    yield "license: unknown"
    yield f"tags: [tribunal, refusal-direction{', lora' if adapter else ''}]"
    yield "---"
    yield ""


def _introduction(stored: StoredTrial, form: Form, written: Written) -> Iterator[str]:
    name, number = base_name(stored), stored.row["trial"]
    yield f"# {name}, trial {number} of {stored.study}"
    yield ""
    yield (
        f"An edit of the refusal direction of `{name}` ({stored.model['architecture']}, "
        f"`{_identity(stored)}`), found and measured by Tribunal. The licence of the base model "
        "applies."
    )
    yield ""
    if form == "merged":
        yield f"The edit is written into the weights, which are stored in {written.dtype}."
        return
    yield (
        f"A LoRA adapter (PEFT) of {len(written.ranks)} modules, {written.shown_ranks}, stored in "
        f"{written.dtype}. Relative Frobenius error of all changes of weights together: "
        f"{written.error:.3g}."
    )


def _identity(stored: StoredTrial) -> str:
    return str(stored.model["identity"])


def _use(stored: StoredTrial, form: Form) -> Iterator[str]:
    """How to load it, and how prompts have to look."""
    prefix, system = stored.model["response_prefix"], stored.model["system_prompt"]
    yield ""
    yield "## Use"
    yield ""
    yield "```python"
    if form == "merged":
        yield "from transformers import AutoModelForCausalLM, AutoTokenizer"
        yield ""
        yield f'model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype="{stored.dtype}")'
        yield "tokenizer = AutoTokenizer.from_pretrained(FOLDER)"
    else:
        yield "from peft import PeftModel"
        yield "from transformers import AutoModelForCausalLM"
        yield ""
        yield f'base = AutoModelForCausalLM.from_pretrained(BASE, dtype="{stored.dtype}")'
        yield "model = PeftModel.from_pretrained(base, FOLDER)"
    yield "```"
    yield ""
    yield (
        "Prompts were rendered by the chat template with its generation prompt, the system prompt "
        f"{_quoted(system)} and the response prefix {_quoted(prefix)}; the model ran in "
        f"{stored.dtype}, and responses are greedy."
    )


def _quoted(text: str | None) -> str:
    return f"`{json.dumps(text, ensure_ascii=False)}`" if text else "(none)"


def _measured(audit: Audit, splits: Sequence[Row]) -> Iterator[str]:
    search = splits[0]
    yield ""
    yield "## Measured"
    yield ""
    yield from _HEAD
    yield _line("search, unedited model", audit.unedited)
    for row in splits:
        if row["stopped"]:
            continue
        yield _line(row["split"] if row is not search else "search, by the study", row)
    yield _line("search, by these files", audit.exported)
    yield ""
    yield (
        "In brackets: 95 % intervals; of rates in % by Clopper-Pearson, of KL by bootstrap. "
        "Overrefusals are refused harmless and borderline-safe prompts. KL is "
        "KL(unedited || edited) of the first response token on harmless prompts."
    )
    if search["stopped"]:
        yield "The study stopped the trial early, for it could no longer matter."
    if search["gated"]:
        yield f"The trial failed a gate on the search split: {search['gate_reason']}."
    yield ""
    limit = "as the trial does, up to float32 rounding" if audit.exact else f"at most {CLOSE:g}"
    yield (
        "These files were loaded again and measured before they were published: "
        f"{audit.changed} of {audit.responses} responses on the search split differ from the "
        f"trial's own, and first tokens lie {audit.kl_to_trial:.3g} nats from the trial's "
        f"(allowed: {limit})."
    )


def _line(name: str, row: Row) -> str:
    judged = row["n_harmless"] + row["n_borderline"]
    low, high = row["kl_interval"]
    return (
        f"| {name} | {row['refusals']}/{row['n_harmful']} ({_percent(row['refusals_interval'])}) | "
        f"{row['overrefusals']}/{judged} ({_percent(row['overrefusals_interval'])}) | "
        f"{row['kl']:.6g} ({low:.3g}-{high:.3g}) |"
    )


def _percent(interval: tuple[float, float]) -> str:
    return "-".join(f"{100 * end:.1f}" for end in interval)


def _parameters(stored: StoredTrial) -> Iterator[str]:
    yield ""
    yield "## Parameters"
    yield ""
    yield "| parameter | value | meaning |"
    yield "|---|---|---|"
    for column in PARAMETERS:
        if stored.row[column.name] is not None:
            yield f"| {column.name} | {stored.row[column.name]} | {column.meaning} |"
    yield f"| row_normalization | {stored.row['row_normalization']} | none, pre or full |"
    yield f"| frame | {stored.row['frame']} | module output, or residual stream |"
    for name, value in stored.config.directions:
        yield f"| directions.{name} | {value} | how residuals became directions |"


def _protocol(stored: StoredTrial, form: Form) -> Iterator[str]:
    judging, made = stored.config.judging, stored.made
    yield ""
    yield "## Protocol"
    yield ""
    yield (
        f"Study `{stored.study}`, protocol `{stored.protocol.key}`, arm `{stored.row['arm']}`, "
        f"seed {stored.config.seed}; labeller `{judging.labeller}`, at most "
        f"{judging.max_new_tokens} new tokens. Judged {made['created']} with "
        + ", ".join(f"{name} {made[name]}" for name in VERSIONS if name in made)
        + f" on {made['device']}."
    )
    yield ""
    yield "To repeat it, save this as `study.toml`, with paths to what was read from local files:"
    yield ""
    yield "```toml"
    yield config_text(stored.config)
    yield "```"
    yield ""
    yield "```bash"
    yield "tribunal run study.toml"
    yield f"tribunal export {stored.study}/{stored.row['trial']} DIR --as {form}"
    yield "```"


VERSIONS = ("tribunal", "python", "torch", "transformers", "tokenizers", "optuna")


def config_text(config: Config) -> str:
    """A config as TOML; of local paths, the last part."""
    return "\n".join(_tables(_without_paths(config.model_dump(mode="json")), ())).strip()


def _tables(tree: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[str]:
    """A tree's own values, then its tables; what is None is left out."""
    plain = {k: v for k, v in tree.items() if v is not None and not isinstance(v, Mapping)}
    if path and plain:
        yield f"\n[{'.'.join(path)}]"
    for key, value in plain.items():
        yield f"{key} = {json.dumps(value, ensure_ascii=False)}"
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _tables(value, (*path, key))


def _without_paths(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_paths(item) for key, item in value.items()}
    if isinstance(value, str) and re.match(r"/|~|[A-Za-z]:\\", value):
        return re.split(r"[/\\]", value.rstrip("/\\"))[-1]
    return value
