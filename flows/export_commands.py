"""`tribunal export` writes the model of a trial; `tribunal chat` talks to it."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from artifacts.errors import ConfigError
from flows import display
from flows.options import PairOption, StudyOption, TableOrJson, TrialArgument, open_store

if TYPE_CHECKING:
    from artifacts.store import Store
    from tasks.export import Audit, Exported, Wish, Written
    from tasks.stage import Reporter, Runtime
    from tasks.stored_trials import StoredTrial

SMALL_RANK = 16  # up to here an adapter is what people expect of one
TERMINATED = 143  # exit status of a process that SIGTERM ended


class Form(StrEnum):
    """What an edit becomes."""

    merged = "merged"
    adapter = "adapter"


class Dtype(StrEnum):
    """Precisions that weights are stored in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


FolderArgument = Annotated[
    Path, typer.Argument(metavar="DIR", help="a new folder, or an empty one")
]
FormOption = Annotated[
    Form, typer.Option("--as", help="the whole model, or a LoRA adapter for the base model")
]
DtypeOption = Annotated[
    Dtype | None,
    typer.Option("--dtype", help="default: the checkpoint's own; float32 for an adapter"),
]
ErrorOption = Annotated[
    float,
    typer.Option(
        "--max-error", min=0, max=0.999, help="of an adapter, as a fraction of the change"
    ),
]
PushOption = Annotated[
    str | None,
    typer.Option("--push", metavar="REPO", help="upload to the hub; the token is in HF_TOKEN"),
]
PublicOption = Annotated[bool, typer.Option("--public", help="with --push: for all to see")]
ChatArgument = Annotated[
    str,
    typer.Argument(metavar="TRIAL", help="as in show; or 'base': the study's unedited model"),
]
TemperatureOption = Annotated[
    float,
    typer.Option("--temperature", min=0, max=100, help="0: the likeliest token, as judging does"),
]
LengthOption = Annotated[int, typer.Option("--max-new-tokens", min=1, help="longest reply, tokens")]
SeedOption = Annotated[int, typer.Option("--seed", help="of what a temperature draws")]


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command(
        epilog="Examples: tribunal export winner edited; tribunal export organism/17 lora "
        "--as adapter; tribunal export winner edited --push me/edited"
    )(export)
    app.command(epilog="Examples: tribunal chat winner; echo 'Hello' | tribunal chat 17")(chat)


def export(
    trial: TrialArgument,
    folder: FolderArgument,
    form: FormOption = Form.merged,
    dtype: DtypeOption = None,
    max_error: ErrorOption = 1e-3,
    study: StudyOption = None,
    push: PushOption = None,
    public: PublicOption = False,
    output: PairOption = TableOrJson.table,
) -> None:
    """Write the model of a trial, load it again, measure it; publish it only if it holds.

    What was written has to measure as the trial does, up to the rounding of its dtype; else it is
    removed and the command fails.
    """
    from tasks.export import Wish
    from tasks.whole_folder import require_free

    if public and not push:
        raise ConfigError("--public says how to --push; give the repository's name too")
    store = open_store()
    found = _stored(store, trial, study)
    require_free(folder)
    api = _hub(push) if push else None
    wish = Wish(form.value, dtype.value if dtype else None, max_error)
    exported = _exported(store, found, folder, wish)
    where = None
    if push:
        from tasks.hub_upload import upload

        message = f"Trial {found.row['trial']} of {found.study}, exported by Tribunal"
        with display.waiting(f"uploading to {push}"):
            where = upload(folder, push, public, message, api)
    _report(found, folder, wish, exported, where, output)


def _stored(store: Store, trial: str, study: str | None) -> StoredTrial:
    from flows import results
    from flows.settings import validate_stored
    from tasks.stored_trials import stored_trial

    name, number = results.find_trial(store, trial, study)
    results.trial_rows(store, name, number)  # which says what the study has instead
    return stored_trial(store, name, number, validate_stored)


def _hub(repo: str) -> Any:
    from tasks.hub_upload import hub, require_name

    require_name(repo)
    return hub()


def _exported(store: Store, found: StoredTrial, folder: Path, wish: Wish) -> Exported:
    from flows import results
    from flows.progress import Progressing
    from tasks.export import export_trial
    from tasks.model_card import model_card
    from tasks.stage import running

    splits = results.trial_rows(store, found.study, int(found.row["trial"]))

    def card(written: Written, audit: Audit) -> str:
        return model_card(found, wish.form, written, audit, splits)

    with (
        Progressing(display.console(stderr=True), 2) as bar,
        _ended_by_sigterm(),
        running(_runtime(store, bar)),
    ):
        return export_trial(found, folder, wish, card)


def _runtime(store: Store, reporter: Reporter) -> Runtime:
    """One model on the first device of the settings."""
    from flows.settings import Settings
    from tasks.stage import Runtime

    settings = Settings.from_environment()
    return Runtime(store, reporter, settings.places[0], settings.device_map, settings.rows)


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end the process as an exception does, which tidies up on its way."""

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(TERMINATED)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _report(
    found: StoredTrial,
    folder: Path,
    wish: Wish,
    exported: Exported,
    where: str | None,
    output: TableOrJson,
) -> None:
    if output is TableOrJson.json:
        answer = {
            "study": found.study,
            "trial": found.row["trial"],
            "folder": str(folder),
            "as": wish.form,
            **asdict(exported.written),
            "files": dict(exported.files),
            "measured": asdict(exported.audit),
            "pushed": where,
        }
        typer.echo(json.dumps(display.plain(answer), indent=1))
        return
    out = display.console()
    display.heading(out, f"Trial {found.row['trial']} of {found.study} as {wish.form}")
    for line in _facts(folder, wish, exported):
        out.print(Text(line), soft_wrap=True)
    display.heading(out, "Search split, measured three times")
    display.print_audit(out, asdict(exported.audit))
    if where:
        out.print(Text(f"uploaded: {where}"), soft_wrap=True)


def _facts(folder: Path, wish: Wish, exported: Exported) -> Iterator[str]:
    from artifacts.places import size_text

    written, files = exported.written, exported.files
    yield f"  {folder}: {len(files)} files, {size_text(sum(files.values()))}, {written.dtype}"
    if written.ranks:
        yield (
            f"  {len(written.ranks)} modules, {written.shown_ranks}; error {written.error:.3g} of "
            f"the change (Frobenius), at most {wish.max_error:g} asked"
        )
    if max(written.ranks.values(), default=0) > SMALL_RANK:
        yield "  a larger --max-error makes it smaller: 0.1 often leaves a rank below 10"
    if written.loaded_by == "weights":
        yield "  audited without PEFT, which is not installed: pip install -e '.[export]'"


def chat(
    trial: ChatArgument,
    study: StudyOption = None,
    temperature: TemperatureOption = 0.0,
    max_new_tokens: LengthOption = 256,
    seed: SeedOption = 0,
) -> None:
    """Talk to the edited model; a line is a turn. /reset begins anew, /quit or Ctrl-D ends.

    The edit is applied by hooks, as in a trial; lines may come from a pipe.
    """
    from flows.chatting import converse
    from tasks.conversation import Manner, open_conversation
    from tasks.stage import Silent, running

    store = open_store()
    base = trial.rpartition("/")[2] == "base"
    found = _stored_base(store, trial, study) if base else _stored(store, trial, study)
    manner = Manner(temperature, max_new_tokens, seed)
    with display.waiting("loading the model"), running(_runtime(store, Silent())):
        conversation = open_conversation(found, edited=not base, manner=manner)
    name = "the unedited model" if base else f"trial {found.row['trial']}"
    converse(conversation, f"{name} of {found.study}; /reset begins anew, /quit ends")


def _stored_base(store: Store, text: str, study: str | None) -> StoredTrial:
    """Any trial of the study: what it has in common with the others is the model."""
    from flows import results

    named = text.rpartition("/")[0]
    name = results.find_study(store, named or study)
    first = results.ranking(store, name, "search", 1).records()[0]
    return _stored(store, str(first["trial"]), name)
