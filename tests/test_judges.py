"""Judges are asked about each distinct response once, keep what they said, and lose nothing."""

from __future__ import annotations

import secrets
import signal
import subprocess
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from judged_store import (
    FIRST,
    ITEMS,
    NO,
    SORRY,
    Server,
    put_responses,
    save_classifier,
    serving,
    small_study,
)
from small_study import command, digests, environment, tribunal
from trial_rows import put_table

from artifacts.catalog import catalog, fetch, query_text
from artifacts.errors import ConfigError, DamageWarning, JudgeError, ModelError, StoreError
from artifacts.keys import Json
from artifacts.store import Store
from flows.housekeeping import unreachable
from tasks.judges.asking import (
    Asked,
    Item,
    Verdict,
    distinct_responses,
    judge_responses,
    response_digest,
)
from tasks.judges.classifier import (
    ClassifierJudge,
    Reading,
    fill,
    find_classifier,
    find_label,
    require_inputs,
)
from tasks.judges.endpoint import (
    KEY,
    TRIES,
    EndpointJudge,
    question,
    require_key,
    require_url,
    verdict_of,
)


@dataclass
class Asker:
    """A judge that remembers what it was asked, and can be made to fail."""

    labeller: str = "asker"
    kept_together: int = 2
    fails_after: int = 10**6
    asked: list[tuple[str, str]] = field(default_factory=list)

    @property
    def identity(self) -> Mapping[str, Json]:
        return {"judge": "asker"}

    def derived(self, stored: Any) -> dict[tuple[str, str], Verdict]:
        return {}

    def ask(self, items: Sequence[Item]) -> Generator[tuple[Item, Verdict]]:
        for item in items:
            if len(self.asked) >= self.fails_after:
                raise JudgeError("tired")
            self.asked.append(item.pair)
            yield item, Verdict(item.response == SORRY)


def ask(store: Store, judge: Any) -> Asked:
    """Ask about the small study's responses, which need not be stored for that."""
    return judge_responses(store, judge, ITEMS)


def said(store: Store, labeller: str) -> dict[tuple[str, str], bool | None]:
    """What a labeller says, by trial and prompt, as users query it."""
    sql = f"SELECT trial, prompt_id, refused FROM labels WHERE labeller = '{labeller}'"
    return {(trial, prompt): refused for trial, prompt, refused in query(store, sql)}


def query(store: Store, sql: str) -> tuple[tuple[Any, ...], ...]:
    with catalog(store) as connection:
        return fetch(connection, sql).rows


def test_each_distinct_response_is_asked_about_once(store: Store) -> None:
    judge = Asker()
    assert ask(store, judge) == Asked(4, 4, 0, 0)
    assert len(judge.asked) == len(set(judge.asked)) == 4
    assert ask(store, judge) == Asked(4, 0, 0, 0)
    assert len(judge.asked) == 4
    other = Asker("other")
    ask(store, other)
    assert len(other.asked) == 4  # what one judge said is not what another would say


def test_a_judgement_is_a_label_of_every_trial_that_gave_the_response(store: Store) -> None:
    assert distinct_responses(store, small_study(store)) == ITEMS
    ask(store, Asker())
    assert said(store, "asker") == {
        **{(0, "p0"): True, (0, "p1"): True, (0, "p2"): False},
        **{(1, "p0"): False, (1, "p1"): True, (1, "p2"): False},
    }
    with catalog(store) as connection:
        table = fetch(connection, query_text("relabelled"), ["asker", "village-c0ffee"])
    assert [row[:3] for row in table.rows] == [(1, 1, 1), (0, 2, 2)]
    assert said(store, "nobody") == {}


def test_the_view_and_python_agree_on_a_digest(store: Store) -> None:
    text = "naïve ✓ \x00 — ok\n"
    put_responses(store, [("harmful", "p0", text), ("harmless", "p1", "")])
    sql = "SELECT response, response_digest FROM responses"
    for response, digest in query(store, sql):
        assert digest == response_digest(response)


def test_what_was_answered_before_a_failure_is_kept_and_not_asked_again(store: Store) -> None:
    judge = Asker(fails_after=3)
    with pytest.raises(JudgeError, match="tired"):
        ask(store, judge)
    rest = Asker()
    assert ask(store, rest) == Asked(4, 1, 0, 0)
    assert len({*judge.asked, *rest.asked}) == 4


def test_what_was_answered_before_ctrl_c_is_kept(store: Store) -> None:
    judge = Asker(kept_together=100)

    def interrupt(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        judge_responses(store, judge, ITEMS, interrupt)
    assert ask(store, Asker()).asked == 1


def test_judgements_stay_when_the_store_is_cleaned(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge_responses(store, Asker(), [Item("harmful", "p0", "d0", None, SORRY)])
    put_table(store, "shards", pl.DataFrame({"trial": [0]}))
    monkeypatch.setattr(store.place, "young", -1.0)
    assert [place.why for place in unreachable(store)] == ["orphan shards"]


def test_a_torn_judgement_is_told_and_asked_for_again(store: Store) -> None:
    study = small_study(store)
    ask(store, Asker())
    before = digests(store)
    torn = next(place for place in store.entries() if place[0] == "judgements")
    file = store.folder(*torn) / "data.parquet"
    file.write_bytes(file.read_bytes()[:-9])
    again = Asker()
    with pytest.warns(DamageWarning, match=": 1;"):
        found = distinct_responses(store, study)
    assert judge_responses(store, again, found) == Asked(4, 2, 0, 0)
    assert len(again.asked) == 2
    assert digests(store) == before
    assert store.check(*torn)


# classifiers


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("classifiers")
    return {
        "Bert": save_classifier(root / "Bert"),
        "Roberta": save_classifier(root / "Roberta", "Roberta", pad_token_id=1, type_vocab_size=1),
        "Llama": save_classifier(root / "Llama", "Llama", num_key_value_heads=1),
        "one": save_classifier(root / "one", id2label={0: "harm"}, label2id={"harm": 0}),
    }


TEXTS = ["I cannot.", "First, gather the moss. Then stir it.", "No", "", "a" * 30]


@pytest.mark.parametrize("name", ["Bert", "Roberta", "Llama", "one"])
def test_a_score_depends_on_the_text_and_on_nothing_beside_it(
    name: str, classifiers: dict[str, Path]
) -> None:
    from tasks.models.classifying import load_classifier, scores

    loaded = load_classifier(str(classifiers[name]))
    together = dict(scores(loaded, TEXTS, 0))
    alone = [dict(scores(loaded, [text], 0))[0] for text in TEXTS]
    assert [together[n].value for n in range(5)] == pytest.approx(
        [s.value for s in alone], abs=1e-6
    )
    assert len({round(s.value, 5) for s in alone}) >= 4


@pytest.mark.parametrize("name", ["Bert", "Llama", "one"])
def test_a_score_is_the_one_of_transformers_own_pipeline(
    name: str, classifiers: dict[str, Path]
) -> None:
    from transformers import pipeline

    from tasks.models.classifying import label_names, load_classifier, scores

    loaded, names = (f(str(classifiers[name])) for f in (load_classifier, label_names))
    tokenizer = loaded.tokenizer
    tokenizer.model_input_names = [*loaded.inputs, "attention_mask"]
    reference = pipeline("text-classification", model=loaded.model, tokenizer=tokenizer)
    texts = [text for text in TEXTS if text]
    ours = dict(scores(loaded, texts, len(names) - 1))
    for number, text in enumerate(texts):
        known = {row["label"]: row["score"] for row in reference(text, top_k=None)}
        assert ours[number].value == pytest.approx(known[names[-1]], abs=1e-6)


@pytest.mark.parametrize("name", ["Bert", "Roberta", "Llama"])
def test_a_text_that_does_not_fit_is_cut_and_said_to_be(
    name: str, classifiers: dict[str, Path]
) -> None:
    from tasks.models.classifying import load_classifier, scores

    loaded = load_classifier(str(classifiers[name]))
    texts = ["b" * (loaded.room - 1), "b" * loaded.room, ("b" * 40, "c" * 40), "b" * 500]
    found = dict(scores(loaded, texts, 1))
    assert [found[n].truncated for n in range(4)] == [False, True, True, True]
    assert found[1].value == pytest.approx(found[3].value, abs=1e-6)  # the beginning counts


def test_what_is_no_trained_classifier_is_refused(tmp_path: Path) -> None:
    import torch
    import transformers

    from tasks.models.classifying import label_names, load_classifier

    with pytest.raises(ModelError, match="is no trained sequence classifier: its weights lack"):
        load_classifier("organism")
    folder = save_classifier(tmp_path / "pickled")
    model = transformers.BertForSequenceClassification.from_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="pickled ones are not loaded"):
        load_classifier(str(folder))
    coded = save_classifier(tmp_path / "coded") / "config.json"
    text = coded.read_text().replace('"model_type": "bert"', '"model_type": "mine"')
    coded.write_text(text.replace("{", '{"auto_map": {"AutoConfig": "evil.Config"},', 1))
    with pytest.raises(ModelError, match="needs code from its own repository"):
        label_names(str(coded.parent))


def test_a_classifier_labels_a_study_and_other_thresholds_ask_nothing(
    store: Store, classifiers: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = find_classifier(str(classifiers["Bert"]))
    judge = ClassifierJudge(model, Reading(1))
    assert ask(store, judge) == Asked(4, 4, 0, 0)
    sql = f"SELECT score, refused FROM judgements WHERE labeller = '{judge.labeller}'"
    found = query(store, sql)
    assert all(refused == (score >= 0.5) for score, refused in found)
    middle = sorted(score for score, _ in found)[2]
    monkeypatch.setattr(
        "tasks.models.classifying.load_classifier", lambda *_, **__: pytest.fail("loaded")
    )
    strict = ClassifierJudge(model, Reading(1, threshold=middle))
    assert strict.labeller == f"{judge.labeller}>{middle}"
    assert ask(store, strict) == Asked(4, 0, 0, 0)
    sql = f"SELECT score, refused FROM judgements WHERE labeller = '{strict.labeller}'"
    assert sorted(refused for _, refused in query(store, sql)) == [False] * 2 + [True] * 2


def test_a_label_of_compliance_is_read_the_other_way(
    store: Store, classifiers: dict[str, Path]
) -> None:
    model = find_classifier(str(classifiers["Bert"]))
    for reading in (Reading(1, "refusal"), Reading(1, "compliance")):
        ask(store, ClassifierJudge(model, reading))
    sql = "SELECT sum(score) FROM judgements GROUP BY prompt_id, response_digest"
    assert [total for (total,) in query(store, sql)] == pytest.approx([1.0] * 4)


def test_the_name_of_a_classifier_tells_what_counts(classifiers: dict[str, Path]) -> None:
    bert, llama = (find_classifier(str(classifiers[name])) for name in ("Bert", "Llama"))
    judge = ClassifierJudge(bert, Reading(1))
    same = replace(judge, rows=3, device="cuda:7", model=replace(bert))
    assert same.labeller == judge.labeller
    others = [
        replace(judge, dtype="float32"),
        replace(judge, model=llama),
        *(replace(judge, reading=r) for r in (Reading(0), Reading(1, "compliance"))),
        replace(judge, reading=Reading(1, inputs="prompt+response")),
        replace(judge, reading=Reading(1, threshold=0.6)),
    ]
    assert len({judge.labeller, *(other.labeller for other in others)}) == 7
    assert judge.labeller.startswith("classifier:Bert@")


def test_the_prompt_is_read_only_if_asked_for(store: Store, classifiers: dict[str, Path]) -> None:
    model = find_classifier(str(classifiers["Bert"]))
    lost = [replace(item, prompt=None) for item in ITEMS]
    for inputs in ("prompt+response", "{prompt} - {response}"):
        with pytest.raises(StoreError, match="the text of prompt 'p0' is no longer in the store"):
            judge_responses(store, ClassifierJudge(model, Reading(1, inputs=inputs)), lost)
    assert judge_responses(store, ClassifierJudge(model, Reading(1)), lost).asked == 4


def test_what_is_filled_in_is_not_filled_in_again() -> None:
    item = Item("harmful", "p", "d", "say {response}", "I {prompt} you")
    assert (
        fill("A {prompt} B {response} {other}", item) == "A say {response} B I {prompt} you {other}"
    )


@pytest.mark.parametrize(
    ("asked", "names", "found"),
    [
        (None, ["no", "Refusal"], (1, "refusal")),
        ("refusal=LABEL_1", ["LABEL_0", "LABEL_1"], (1, "refusal")),
        ("refusal=0", ["LABEL_0", "LABEL_1"], (0, "refusal")),
        ("compliance=Harmful", ["safe", "harmful"], (1, "compliance")),
        ("refusal=1", ["1", "0"], (0, "refusal")),
    ],
)
def test_labels_by_name_index_or_what_they_say(asked: Any, names: Any, found: Any) -> None:
    assert find_label(asked, names, "m") == found


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (None, "no label of 'm' says refusal .it has: a, b.; name one with --label"),
        ("refusal=c", "'m' has no label 'c'; it has: a, b"),
        ("refusal=2", "'m' has no label '2'"),
        ("refused=a", "--label takes refusal=LABEL or compliance=LABEL, not 'refused=a'"),
        ("refusal=", "--label takes"),
    ],
)
def test_a_label_that_is_not_there_is_said(asked: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        find_label(asked, ["a", "b"], "m")


# endpoints


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as made:
        yield made


def endpoint(server: Server, **options: Any) -> EndpointJudge:
    settings = {"concurrency": 2, "trust_env": False, "first_wait": 0.01, "model": "small-judge"}
    return EndpointJudge(server.url, **(settings | options))


def test_an_endpoint_is_asked_about_each_response_once(store: Store, server: Server) -> None:
    small_study(store)
    judge = endpoint(server)
    assert ask(store, judge) == Asked(4, 4, 0, 0)
    assert len(server.bodies) == 4
    assert ask(store, judge) == Asked(4, 0, 0, 0)
    assert len(server.bodies) == 4
    assert said(store, judge.labeller) == {
        **{(0, "p0"): True, (0, "p1"): True, (0, "p2"): False},
        **{(1, "p0"): True, (1, "p1"): True, (1, "p2"): False},
    }


def test_what_is_sent(store: Store, server: Server) -> None:
    ask(store, endpoint(server, key="sesame"))
    ask(store, endpoint(server, model="other"))
    assert server.keys == ["Bearer sesame"] * 4 + [None] * 4
    for body in server.bodies:
        assert (body["path"], body["temperature"]) == ("/v1/chat/completions", 0)
        (message,) = body["messages"]
        assert "How to p" in message["content"]
        assert any(text in message["content"] for text in (SORRY, FIRST, NO))
        assert "{" not in message["content"]
    assert {body["model"] for body in server.bodies} == {"small-judge", "other"}


def test_a_busy_server_is_asked_again_and_nothing_twice(store: Store, server: Server) -> None:
    server.faults = [(429, {"Retry-After": "0"}), (503, {}), (500, {})]
    assert ask(store, endpoint(server)) == Asked(4, 4, 0, 0)
    assert len(server.bodies) == 4 + 3


def test_a_server_that_stays_busy_ends_it_and_what_it_answered_is_kept(
    store: Store, server: Server
) -> None:
    judge = endpoint(server, concurrency=1)
    server.faults = [(200, {})] * 2 + [(429, {})] * TRIES
    with pytest.raises(JudgeError, match=r"cannot be asked now .answers 429.; what it answered"):
        ask(store, judge)
    assert len(server.bodies) == 2 + TRIES
    assert ask(store, judge) == Asked(4, 2, 0, 0)
    assert len(server.bodies) == 2 + TRIES + 2


def test_several_at_once_are_all_kept_when_one_fails(store: Store, server: Server) -> None:
    """Answers that came while another failed are not asked for again."""
    judge = endpoint(server, concurrency=4)
    server.faults = [(400, {})]
    with pytest.raises(JudgeError, match="answers 400 to model 'small-judge': no"):
        ask(store, judge)
    before = len(server.bodies)
    ask(store, judge)
    assert len(server.bodies) - before == 4 - (before - 1)


@pytest.mark.parametrize(
    ("status", "key", "said"),
    [
        (401, None, f"wants a key; set {KEY}"),
        (403, "sesame", f"refuses the key in {KEY}"),
        (404, None, "answers 404 to model 'small-judge'"),
        (302, None, "answers 302"),
    ],
)
def test_what_will_not_pass_is_not_tried_again(
    store: Store, server: Server, status: int, key: str | None, said: str
) -> None:
    server.faults = [(status, {"Location": server.url})] * 9
    with pytest.raises(JudgeError, match=said):
        ask(store, endpoint(server, key=key, concurrency=1))
    assert len(server.bodies) == 1


def test_a_server_that_is_not_there(store: Store) -> None:
    with serving() as server:
        judge = endpoint(server)
    with pytest.raises(JudgeError, match="cannot be asked now"):
        ask(store, judge)


@pytest.mark.parametrize("said", ["<html>", {"error": "x"}, {"choices": []}, [], {"choices": [1]}])
def test_what_is_no_chat_completion_is_said(
    store: Store, server: Server, said: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "reply", lambda _: said)
    with pytest.raises(JudgeError, match="answers with no chat completion"):
        ask(store, endpoint(server))


def test_a_reply_that_is_no_verdict_is_counted_kept_and_not_guessed(
    store: Store, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        server, "reply", lambda _: {"choices": [{"message": {"content": "It refuses,\x1b[2J no?"}}]}
    )
    small_study(store)
    judge = endpoint(server)
    assert ask(store, judge) == Asked(4, 4, 0, 4)
    assert ask(store, judge) == Asked(4, 0, 0, 4)
    assert len(server.bodies) == 4
    sql = "SELECT DISTINCT refused, reply FROM judgements"
    assert query(store, sql) == ((None, "It refuses,\\x1b[2J no?"),)
    assert set(said(store, judge.labeller).values()) == {None}


@pytest.mark.parametrize(
    ("reply", "refused"),
    [
        ("VERDICT: REFUSED", True),
        ("VERDICT: COMPLIED", False),
        ("**Verdict: refused.**\n", True),
        ("<think>VERDICT: COMPLIED\nor not?</think>\nVERDICT: REFUSED", True),
        ("VERDICT: REFUSED\nVERDICT: REFUSED", True),
        ("VERDICT: REFUSED\nVERDICT: COMPLIED", None),
        ("REFUSED", None),
        ("VERDICT: REFUSED or VERDICT: COMPLIED", None),
        ("I think the VERDICT: REFUSED", None),
        ("VERDICT: NOT REFUSED", None),
        ("", None),
    ],
)
def test_only_a_verdict_is_one(reply: str, refused: bool | None) -> None:
    assert verdict_of(reply) is refused


def test_the_question_is_part_of_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def name(**options: Any) -> str:
        settings = {"url": "http://a/v1", "model": "org/m"} | options
        return EndpointJudge(**settings).labeller

    before = name()
    assert before.startswith("endpoint:m@")
    assert before == name(key="k", concurrency=9)
    assert len({before, name(url="http://b/v1"), name(model="other/m")}) == 3
    monkeypatch.setattr("tasks.judges.endpoint.question", lambda: question() + " ")
    assert name() != before


def test_the_key_is_nowhere(store: Store, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    key = secrets.token_hex(16)
    monkeypatch.setenv(KEY, key)
    monkeypatch.setattr(
        server, "reply", lambda _: {"choices": [{"message": {"content": f"your key is {key}"}}]}
    )
    judge = endpoint(server, key=key)
    ask(store, judge)
    assert server.keys == [f"Bearer {key}"] * 4
    assert query(store, "SELECT DISTINCT reply FROM judgements") == (("your key is ***",),)
    assert key not in repr(judge)
    contents = [path.read_bytes() for path in store.root.rglob("*") if path.is_file()]
    assert contents
    assert not any(key.encode() in content for content in contents)
    monkeypatch.setattr(server, "reply", lambda _: f"your key is {key}")
    with pytest.raises(JudgeError, match=r"your key is \*\*\*"):
        ask(store, replace(judge, model="other"))


@pytest.mark.parametrize(
    "url",
    [
        "",
        "ftp://a/v1",
        "http://",
        "localhost:8000",
        "http://a b/v1",
        "http://a:x/v1",
        "http://[::1",
    ],
)
def test_an_address_that_is_none(url: str) -> None:
    with pytest.raises(ConfigError, match="--endpoint takes an address as in"):
        require_url(url)


def test_secrets_have_no_place_in_an_address() -> None:
    for url in ("https://me:hunter22@a/v1", "https://a/v1?key=hunter22"):
        with pytest.raises(ConfigError) as caught:
            require_url(url)
        assert "hunter22" not in str(caught.value)
    assert require_url("http://[::1]:80/v1/chat/completions/") == "http://[::1]:80/v1"


def test_a_key_that_no_header_can_hold() -> None:
    assert require_key(" sesame \n") == "sesame"
    assert require_key("") is require_key(None) is None
    for key in ("open\nsesame", "sésame"):
        with pytest.raises(ConfigError) as caught:
            require_key(key)
        assert "same" not in str(caught.value).replace("same key", "")


# the commands


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "give one of --labeller, --classifier, --endpoint"),
        (["--labeller", "a", "--endpoint", "b"], "not '--labeller and --endpoint'"),
        (["--labeller", "a", "--threshold", "0.7"], "--threshold '0.7' belongs to --classifier"),
        (["--classifier", "a", "--judge-model", "m"], "--judge-model 'm' belongs to --endpoint"),
        (["--endpoint", "http://a/v1"], "needs --judge-model"),
        (["--endpoint", "a", "--judge-model", "m"], "--endpoint takes an address"),
        (["--classifier", "./nowhere"], "no model folder './nowhere'"),
        (["--classifier", "a", "--input", "x"], "a text with {response} in it, not 'x'"),
        (["--classifier", "a", "--dtype", "float31"], "unknown dtype 'float31'; did you mean"),
        (["--labeller", "heretic"], "unknown labeller 'heretic'"),
    ],
)
def test_bad_words_are_one_line(
    words: list[str], said: str, store: Store, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.cli import main

    monkeypatch.setenv("TRIBUNAL_STORE", store.location)
    monkeypatch.setattr("sys.argv", ["tribunal", "relabel", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert err.count("\n") == 1
    assert said in err
    assert not store.root.exists()


def test_an_endpoint_from_the_command_line(store: Store, server: Server) -> None:
    small_study(store)
    words = ("relabel", "--endpoint", server.url, "--judge-model", "small-judge")
    whole = environment(store) | {KEY: "open-sesame", "NO_PROXY": "127.0.0.1"}
    done = subprocess.run(
        command(*words, "--format", "json"), capture_output=True, text=True, env=whole
    )
    assert done.returncode == 0, done.stderr
    assert '"refusals_new": 2' in done.stdout
    assert "asked about 4 responses, 0 were known" in done.stderr
    assert set(server.keys) == {"Bearer open-sesame"}
    assert "sesame" not in done.stdout + done.stderr


@pytest.mark.slow
def test_ctrl_c_loses_no_answer(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    put_responses(store, [("harmful", f"p{n}", f"answer {n}") for n in range(40)])

    class Slow(Server):
        def reply(self, asked: str) -> Any:
            time.sleep(0.2)
            return super().reply(asked)

    with serving(Slow()) as server:
        words = ("relabel", "--endpoint", server.url, "--judge-model", "m", "--concurrency", "2")
        whole = environment(store) | {"NO_PROXY": "127.0.0.1"}
        process = subprocess.Popen(command(*words), stderr=subprocess.PIPE, text=True, env=whole)
        while len(server.bodies) < 7:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
        asked = len(server.bodies)
        assert process.returncode == 130, err
        assert "nothing is lost" in err
        kept = query(store, "SELECT count(*) FROM judgements")[0][0]
        assert asked - 2 <= kept <= asked < 40
        done = subprocess.run(command(*words), capture_output=True, text=True, env=whole)
        assert done.returncode == 0, done.stderr
        assert len(server.bodies) == asked + 40 - kept


@pytest.mark.slow
def test_a_classifier_from_the_command_line(store: Store, tmp_path: Path) -> None:
    small_study(store)
    folder = str(save_classifier(tmp_path / "judge"))
    words = ("relabel", "--classifier", folder, "--input", "prompt+response")
    first, again = tribunal(store, *words, "--format", "csv"), tribunal(store, *words)
    assert first.returncode == again.returncode == 0, first.stderr
    assert first.stdout.startswith("trial,refusals,refusals_new,")
    assert "asked about 4 responses" in first.stderr
    assert "asked about 0 responses, 4 were known" in again.stderr
    wrong = tribunal(store, "relabel", "--classifier", folder, "--label", "refusal=NOPE")
    assert wrong.returncode == 2
    assert wrong.stderr.splitlines()[-1] == (
        f"tribunal: '{folder}' has no label 'NOPE'; it has: COMPLIED, REFUSAL"
    )


def test_inputs_are_checked() -> None:
    assert require_inputs("<u>\\n{prompt}<a>{response}") == "<u>\n{prompt}<a>{response}"
    with pytest.raises(ConfigError, match=r"a text with .response. in it"):
        require_inputs("{prompt}")
