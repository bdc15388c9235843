"""`tribunal relabel` labels stored responses again, `agreement` compares, `label` asks a person."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from artifacts.errors import ConfigError
from flows import display
from flows.options import Format, FormatOption, PairOption, StudyOption, TableOrJson, open_store

if TYPE_CHECKING:
    from rich.console import Console

    from artifacts.catalog import Table
    from artifacts.store import Store
    from tasks.judges.asking import Asked, Item, Judge
    from tasks.judges.labellers import Compared

EVERY = 10.0  # seconds between lines of progress where there is no terminal

LabellerOption = Annotated[
    str | None, typer.Option("--labeller", help="a versioned keyword labeller; loads no model")
]
ClassifierOption = Annotated[
    str | None,
    typer.Option(
        "--classifier",
        metavar="MODEL",
        help="a sequence-classification model, hub id or folder; runs on this machine",
    ),
]
RevisionOption = Annotated[
    str | None, typer.Option("--revision", help="of a classifier on the hub; default: main")
]
LabelOption = Annotated[
    str | None,
    typer.Option(
        "--label",
        metavar="SIDE=LABEL",
        help="which output to read: refusal=LABEL or compliance=LABEL, a name or an index; "
        "default: the one whose name says refusal",
    ),
]
ThresholdOption = Annotated[
    float | None,
    typer.Option("--threshold", min=0, max=1, help="refused from this score on; default: 0.5"),
]
InputOption = Annotated[
    str | None,
    typer.Option(
        "--input",
        metavar="TEXT",
        help="response (default), prompt+response, or a text with {prompt} and {response}",
    ),
]
DtypeOption = Annotated[
    str | None,
    typer.Option("--dtype", help="float32, bfloat16 or float16; default: the checkpoint's own"),
]
EndpointOption = Annotated[
    str | None,
    typer.Option(
        "--endpoint",
        metavar="URL",
        help="an OpenAI-compatible server, as in http://127.0.0.1:8000/v1: every prompt and "
        "response of the study is SENT THERE; its key is in TRIBUNAL_JUDGE_KEY",
    ),
]
ModelOption = Annotated[
    str | None, typer.Option("--judge-model", metavar="NAME", help="the server's name for it")
]
ConcurrencyOption = Annotated[
    int | None,
    typer.Option("--concurrency", min=1, max=256, help="questions at once; default: 4"),
]
AmongOption = Annotated[
    list[str] | None,
    typer.Option("--labeller", help="only pairs with this labeller; may be repeated"),
]
CountOption = Annotated[int, typer.Option("--n", "-n", min=1, help="responses of the sample")]
SeedOption = Annotated[int, typer.Option("--seed", help="of the sample")]
ByOption = Annotated[str, typer.Option("--by", metavar="NAME", help="who labels")]
FileOption = Annotated[
    Path | None,
    typer.Option(
        "--from",
        metavar="FILE.csv",
        help="labels made elsewhere: prompt_id,response_digest,verdict",
    ),
]


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command(
        epilog="Examples: tribunal relabel --labeller prefix-strict; tribunal relabel --classifier "
        "me/refusals --label refusal=LABEL_1; tribunal relabel --endpoint http://127.0.0.1:8000/v1 "
        "--judge-model qwen3"
    )(relabel)
    app.command(epilog="Examples: tribunal agreement; tribunal agreement --labeller hand:me")(
        agreement
    )
    app.command(
        epilog="Examples: tribunal label; tribunal label --n 200 --by ada; "
        "tribunal label --from labels.csv --by ada"
    )(label)


def relabel(
    labeller: LabellerOption = None,
    classifier: ClassifierOption = None,
    endpoint: EndpointOption = None,
    judge_model: ModelOption = None,
    label: LabelOption = None,
    threshold: ThresholdOption = None,
    inputs: InputOption = None,
    revision: RevisionOption = None,
    dtype: DtypeOption = None,
    concurrency: ConcurrencyOption = None,
    study: StudyOption = None,
    form: FormatOption = Format.table,
) -> None:
    """Label every stored response again: by keywords, a classifier, or a model behind an endpoint.

    The ranking stays with the study's own labeller. A judge is asked about each distinct response
    once; what it answered is stored, so the same command goes on after an interruption.
    """
    ways = {"--labeller": labeller, "--classifier": classifier, "--endpoint": endpoint}
    way = _only_one(ways)
    _refuse_strangers(
        way, "--endpoint", {"--judge-model": judge_model, "--concurrency": concurrency}
    )
    of_classifier = {"--label": label, "--threshold": threshold, "--input": inputs}
    _refuse_strangers(
        way, "--classifier", of_classifier | {"--revision": revision, "--dtype": dtype}
    )
    if labeller is not None:
        _by_keywords(labeller, study, form)
        return
    judge = (
        _classifier(str(classifier), revision, label, threshold, inputs, dtype)
        if classifier is not None
        else _endpoint(str(endpoint), judge_model, concurrency)
    )
    _by_judge(judge, study, form)


def _only_one(ways: Mapping[str, Any]) -> str:
    """The one option that is given."""
    given = [name for name, value in ways.items() if value is not None]
    if len(given) != 1:
        said = f", not '{' and '.join(given)}'" if given else ""
        raise ConfigError(f"give one of {', '.join(ways)}{said}")
    return given[0]


def _refuse_strangers(way: str, owner: str, options: Mapping[str, Any]) -> None:
    """Refuse options of another way, which would be without effect."""
    for name, value in options.items():
        if value is not None and way != owner:
            raise ConfigError(f"{name} '{value}' belongs to {owner}, not to {way}")


def _by_keywords(labeller: str, study: str | None, form: Format) -> None:
    from flows.results import find_study
    from tasks.numerics.labels import LABELLERS
    from tasks.relabel import judged_artifacts
    from tasks.relabel import relabel as relabel_stage
    from tasks.stage import Runtime, running

    if labeller not in LABELLERS:
        raise ConfigError.unknown("labeller", labeller, LABELLERS)
    store = open_store()
    name = find_study(store, study)
    with running(Runtime(store)):
        for judged in judged_artifacts():
            relabel_stage(judged=judged, labeller=labeller)
    _report_labels(store, name, labeller, form)


def _classifier(
    name: str,
    revision: str | None,
    label: str | None,
    threshold: float | None,
    inputs: str | None,
    dtype: str | None,
) -> Judge:
    from flows.settings import Settings
    from tasks.judges.classifier import (
        RESPONSE,
        THRESHOLD,
        ClassifierJudge,
        Reading,
        find_classifier,
        find_label,
        require_inputs,
    )

    known = ("auto", "float32", "bfloat16", "float16")
    if dtype is not None and dtype not in known:
        raise ConfigError.unknown("dtype", dtype, known)
    read = require_inputs(RESPONSE if inputs is None else inputs)
    model = find_classifier(name, revision)
    with display.waiting(f"reading {name}"):
        from tasks.models.classifying import label_names

        names = label_names(model.source, model.revision)
    index, side = find_label(label, names, name)
    settings = Settings.from_environment()
    return ClassifierJudge(
        model,
        Reading(index, side, read, THRESHOLD if threshold is None else threshold),
        dtype or "auto",
        settings.places[0],
        settings.rows,
    )


def _endpoint(url: str, model: str | None, concurrency: int | None) -> Judge:
    import os

    from tasks.judges.endpoint import KEY, EndpointJudge, require_key, require_url

    if not model or not model.isprintable():
        raise ConfigError(
            f"--endpoint '{url}' needs --judge-model, the server's name for the judge"
        )
    key = require_key(os.environ.get(KEY))
    return EndpointJudge(require_url(url), model, key, concurrency or 4)


def _by_judge(judge: Judge, study: str | None, form: Format) -> None:
    from flows.results import find_study
    from tasks.judges.asking import distinct_responses, judge_responses

    store = open_store()
    name = find_study(store, study)
    items = distinct_responses(store, name)
    with _counting(judge.labeller) as count:
        asked = judge_responses(store, judge, items, count)
    _say_asked(judge.labeller, asked)
    _report_labels(store, name, judge.labeller, form)


def _say_asked(labeller: str, asked: Asked) -> None:
    """What was asked, on stderr, so that every form of the answer is free of it."""
    out = display.console(stderr=True)
    known = asked.responses - asked.asked
    said = f"{labeller}: asked about {asked.asked} responses, {known} were known"
    out.print(Text(said), soft_wrap=True)
    if asked.truncated:
        out.print(Text(f"{asked.truncated} were too long for it: it saw their beginning"))
    if asked.unclear:
        out.print(Text(f"{asked.unclear} replies were no verdict, and count as neither label"))


@contextmanager
def _counting(what: str) -> Iterator[Callable[[int, int], None]]:
    """Progress with the time left: a bar on a terminal, a line every 10 s elsewhere."""
    from flows.progress import duration

    out = display.console(stderr=True)
    began = last = 0.0
    first = 0  # answers when the clock was started: until then, a judge may have been loading

    def say(done: int, total: int) -> None:
        nonlocal began, last, first
        now = time.monotonic()
        if done and not first:
            began, last, first = now, now, done
        elif done and now - last >= EVERY:
            last = now
            left = duration((now - began) * (total - done) / (done - first))
            out.print(Text(f"{what}: {done} of {total}, {left} left"), soft_wrap=True)

    if not out.is_terminal:
        yield say
        return
    with display.counting(what) as bar:
        yield bar


def _report_labels(store: Store, study: str, labeller: str, form: Format) -> None:
    """The trials of a study under one labeller beside the study's own."""
    from artifacts.catalog import ask, query_text, write_database

    write_database(store)
    count = "SELECT count(*) FROM trials WHERE stopped AND study = $1"
    table = ask(store, query_text("relabelled"), [labeller, study])
    left = int(str(ask(store, count, [study]).rows[0][0]))
    if form is not Format.table:
        typer.echo(display.as_text(table, form))
        return
    out = display.console()
    display.heading(out, f"{study}: {labeller} beside the study's own labeller")
    display.print_query(out, table)
    if left:
        out.print(
            f"{left} trials are left out: by the study's own labels they could not matter and were "
            "stopped. To have them under other labels, run with search.racing=false",
            style="dim",
        )


def agreement(
    study: StudyOption = None,
    labeller: AmongOption = None,
    form: FormatOption = Format.table,
) -> None:
    """How far labellers agree: Cohen's kappa per pair and class, with 95 % intervals over prompts.

    On every distinct response of the study that both have labelled, the unedited model's included.
    """
    from flows.results import find_study
    from tasks.judges.asking import distinct_responses
    from tasks.judges.labellers import compare_all, labels_of

    store = open_store()
    name = find_study(store, study)
    items = distinct_responses(store, name)
    labels = labels_of(store, items)
    for one in labeller or ():
        if one not in labels:
            raise ConfigError.unknown("labeller", one, labels)
    found = list(compare_all(items, labels, labeller or ()))
    if form is not Format.table:
        typer.echo(display.as_text(_as_table(found), form))
        return
    out = display.console()
    display.heading(out, f"{name}: agreement of labellers on {len(items)} distinct responses")
    _print_agreement(out, found)


def _as_table(found: Sequence[Compared]) -> Table:
    from artifacts.catalog import Table

    rows = [_record(one) for one in found]
    columns = tuple(rows[0]) if rows else ()
    return Table(columns, tuple(tuple(row.values()) for row in rows))


def _record(one: Compared) -> dict[str, Any]:
    return {
        "labeller_a": one.labeller_a,
        "labeller_b": one.labeller_b,
        "class": one.prompt_class,
        **asdict(one.found),
        "unclear": one.unclear,
        "agreement": one.found.rate,
    }


def _print_agreement(out: Console, found: Sequence[Compared]) -> None:
    """A table per pair. Columns A and B: what only one of the two calls a refusal."""
    columns = ("class", "n", "prompts", "both", "A", "B", "none", "equal", "kappa", "95 %")
    pairs = list(dict.fromkeys((one.labeller_a, one.labeller_b) for one in found))
    for a, b in pairs:
        out.print()
        out.print(Text(f"A {a}\nB {b}"), soft_wrap=True)
        of = [one for one in found if (one.labeller_a, one.labeller_b) == (a, b)]
        display.print_rows(out, columns, [_cells(one) for one in of])
        if of[0].unclear:
            out.print(Text(f"left out, unclear to one of them: {of[0].unclear}", style="dim"))
    out.print()
    note = (
        "n: distinct responses; refused by both, by A alone, by B alone, by none; no kappa: chance "
        "alone agrees always"
    )
    out.print(Text(note, style="dim"))


def _cells(one: Compared) -> list[str]:
    found = one.found
    counts = (found.responses, found.prompts, found.both, found.only_a, found.only_b, found.neither)
    equal = f"{100 * found.rate:.1f} %" if found.responses else "-"
    kappa = "-" if math.isnan(found.kappa) else f"{found.kappa:.2f}"
    interval = "-" if math.isnan(found.low) else f"{found.low:.2f} to {found.high:.2f}"
    return [one.prompt_class, *map(str, counts), equal, kappa, interval]


def label(
    study: StudyOption = None,
    count: CountOption = 50,
    seed: SeedOption = 0,
    by: ByOption = "me",
    file: FileOption = None,
    form: PairOption = TableOrJson.table,
) -> None:
    """Label a sample of responses by hand, in the terminal; see how each labeller agrees with you.

    The sample has equal parts of each class and keyword verdict, and shows neither. Every answer is
    stored at once: quit whenever you like, the same command goes on from there.
    """
    from artifacts.catalog import ask, write_database
    from flows.labelling import label_by_hand, require_terminal
    from flows.results import find_study
    from tasks.judges.asking import distinct_responses
    from tasks.judges.by_hand import keep_answer, keep_file, labeller_of, last_answers, sample

    labeller = labeller_of(by)
    if file is None:
        require_terminal()
    store = open_store()
    name = find_study(store, study)
    items = distinct_responses(store, name)
    if file is not None:
        new = keep_file(store, labeller, file, items)
        display.console(stderr=True).print(Text(f"{new} labels of '{file}' are new"))
        write_database(store)
        _report_hand(store, items, labeller, form)
        return
    rows = ask(store, "SELECT labeller FROM studies WHERE study = $1", [name]).rows
    drawn = sample(items, str(rows[0][0]), count, seed)
    answers = last_answers(store, labeller)

    def keep(item: Item, refused: bool | None, number: int) -> None:
        keep_answer(store, labeller, item, refused, number)

    try:
        label_by_hand(drawn, answers, keep)
    finally:
        write_database(store)
    done = sum(item.pair in answers for item in drawn)
    typer.echo(f"{done} of {len(drawn)} are labelled by {labeller}", err=True)
    _report_hand(store, items, labeller, form)


def _report_hand(store: Store, items: Sequence[Item], labeller: str, form: TableOrJson) -> None:
    """How every other labeller agrees with one person's labels."""
    from tasks.judges.labellers import compare_all, labels_of

    labels = labels_of(store, items)
    found = list(compare_all(items, labels, [labeller])) if labeller in labels else []
    if form is TableOrJson.json:
        typer.echo(json.dumps([display.plain(_record(one)) for one in found], indent=1))
    elif found:
        out = display.console()
        display.heading(out, f"Agreement with {labeller}")
        _print_agreement(out, found)
