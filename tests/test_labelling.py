"""Labels by hand: a blind sample, a screen that nothing can disturb, and no answer that is lost."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pexpect
import pytest
from hypothesis import given
from hypothesis import strategies as st
from judged_store import FIRST, ITEMS, NO, SORRY, put_responses, small_study
from small_study import command, environment, tribunal

from artifacts.catalog import user_query
from artifacts.errors import ConfigError
from artifacts.store import Store
from flows.labelling import HELP, plain, wrapped
from tasks.judges.asking import Item, distinct_responses, read_judgements
from tasks.judges.by_hand import keep_answer, keep_file, labeller_of, last_answers, sample
from tasks.judges.labellers import compare_all, labels_of


def items(
    count: int, refused: int = 0, prompt_class: str = "harmful", start: int = 0
) -> list[Item]:
    """Responses to prompts of their own; the first ones refuse."""
    return [
        Item(prompt_class, f"p{n}", f"d{n}", f"How {n}?", SORRY if n - start < refused else FIRST)
        for n in range(start, start + count)
    ]


def strata(drawn: Sequence[Item]) -> Counter[tuple[str, bool]]:
    return Counter((item.prompt_class, item.response == SORRY) for item in drawn)


def test_rare_strata_are_drawn_as_often_as_common_ones_while_they_last() -> None:
    found = [*items(500, refused=3), *items(100, 20, "harmless", start=1000)]
    drawn = sample(found, "heretic-33", 40, seed=0)
    assert len(drawn) == 40
    assert strata(drawn)["harmful", True] == 3
    rest = [count for stratum, count in strata(drawn).items() if stratum != ("harmful", True)]
    assert max(rest) - min(rest) <= 1


@given(st.integers(0, 60), st.integers(0, 5), st.randoms())
def test_a_sample_depends_on_its_seed_and_not_on_any_order(
    count: int, seed: int, random: Any
) -> None:
    found = items(40, refused=10)
    drawn = sample(found, "heretic-33", count, seed)
    assert len(drawn) == len({item.pair for item in drawn}) == min(count, 40)
    shuffled = random.sample(found, len(found))
    assert sample(shuffled, "heretic-33", count, seed) == drawn


def test_seeds_draw_different_samples_and_the_order_tells_no_stratum() -> None:
    found = items(400, refused=200)
    one, other = (sample(found, "heretic-33", 60, seed) for seed in (0, 1))
    assert {i.pair for i in one} != {i.pair for i in other}
    verdicts = [item.response == SORRY for item in one]
    assert 15 < sum(a != b for a, b in pairwise(verdicts)) < 45


def test_new_responses_replace_few_of_a_sample() -> None:
    found = items(400, refused=100)
    before = {item.pair for item in sample(found, "heretic-33", 50, 0)}
    more = [*found, *items(40, 10, start=1000)]
    assert len(before & {item.pair for item in sample(more, "heretic-33", 50, 0)}) >= 40


@given(st.text(), st.integers(20, 80))
def test_no_text_can_control_the_terminal(text: str, width: int) -> None:
    lines = wrapped(text, width)
    assert all(line.isprintable() for line in lines)
    assert all(len(line) <= width for line in lines)


def test_controls_are_spelt_out_and_words_stay() -> None:
    assert plain("\x1b[2J\x07a\rb\u202ec\u00a0d\ne") == "\\x1b[2J\\x07a\\rb\\u202ec d\ne"
    assert wrapped("one two\n\nthree", 40) == ["  one two", "  ", "  three"]
    assert "".join(line[2:] for line in wrapped("x" * 50, 20)) == "x" * 50


def test_the_last_answer_of_a_person_holds(store: Store) -> None:
    item = ITEMS[0]
    for number, refused in enumerate([True, False, None]):
        keep_answer(store, "hand:me", item, refused, number)
    assert last_answers(store, "hand:me") == {item.pair: (None, 2)}
    assert list(read_judgements(store)) == ["hand:me"]
    keep_answer(store, "hand:you", item, True, 0)
    labels = labels_of(store, ITEMS)
    assert (labels["hand:me"][item.pair], labels["hand:you"][item.pair]) == (None, True)
    between = next(compare_all([item], {n: labels[n] for n in ("hand:me", "hand:you")}))
    assert (between.unclear, between.found.responses) == (1, 0)


@pytest.mark.parametrize("name", ["", "a b", "a@b", "../x", "x" * 41, "é"])
def test_names_are_plain(name: str) -> None:
    with pytest.raises(ConfigError, match="--by takes a name of up to 40"):
        labeller_of(name)


def csv_of(verdicts: Sequence[str], extra: str = "") -> str:
    """A file of verdicts on the small study's responses."""
    rows = [
        f"{item.prompt_id},{item.response_digest},{verdict}"
        for item, verdict in zip(ITEMS, verdicts, strict=False)
    ]
    return "\n".join(["prompt_id,response_digest,verdict", *rows, extra])


def test_labels_made_elsewhere_come_in_once(store: Store, tmp_path: Path) -> None:
    found, file = ITEMS, tmp_path / "labels.csv"
    file.write_text(csv_of(["refused", "complied", "Unclear", "complied"]))
    assert keep_file(store, "hand:me", file, found) == 4
    assert keep_file(store, "hand:me", file, found) == 0
    said = [last_answers(store, "hand:me")[item.pair] for item in found]
    assert said == [(True, 0), (False, 0), (None, 0), (False, 0)]
    file.write_text("\ufeff" + csv_of(["refused", "refused"]))
    assert keep_file(store, "hand:me", file, found) == 1
    said = [last_answers(store, "hand:me")[item.pair] for item in found]
    assert said == [(True, 0), (True, 1), (None, 0), (False, 0)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has no column 'prompt_id'"),
        ("prompt_id,verdict\np0,refused", "has no column 'response_digest'"),
        ("prompt_id,response_digest,verdict\n", "holds no labels"),
        ("prompt_id,response_digest,verdict\np0,d,maybe", "line 2: the verdict 'maybe' is none of"),
        (
            "prompt_id,response_digest,verdict\np0,d,refused",
            "line 2: the study has no response 'd'",
        ),
        ("prompt_id,response_digest,verdict\np0", "line 2: the verdict '' is none of"),
        ('prompt_id,response_digest,verdict\n"p0', "cannot read"),
        ("prompt_id,response_digest,verdict\n\x00,,", "cannot read|line 2"),
        (b"\xff\xfe\x00", "cannot read"),
        (None, "no file"),
    ],
)
def test_a_file_of_labels_that_is_wrong_is_one_line(
    store: Store, tmp_path: Path, text: Any, said: str
) -> None:
    file = tmp_path / "labels.csv"
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=said):
        keep_file(store, "hand:me", file, ITEMS)
    assert read_judgements(store) == {}


def test_two_verdicts_on_one_response_are_refused(store: Store, tmp_path: Path) -> None:
    first, file = ITEMS[0], tmp_path / "labels.csv"
    twice = f"{first.prompt_id},{first.response_digest},complied"
    file.write_text(csv_of(["refused"], twice))
    with pytest.raises(ConfigError, match=f"line 3: response '{first.response_digest}' has two"):
        keep_file(store, "hand:me", file, ITEMS)


# the commands


def long_study(store: Store) -> str:
    """Six distinct responses, one of them longer than a screen, one with terminal escapes."""
    answers = [
        ("harmful", "p0", SORRY),
        ("harmful", "p1", "\x1b[2J\x1b]0;owned\x07 First, gather the moss."),
        ("harmful", "p2", " ".join(f"word{n}" for n in range(500))),
        ("harmless", "p3", NO),
        ("harmless", "p4", FIRST),
        ("harmless", "p5", SORRY),
    ]
    return put_responses(store, answers, [])


def screen(store: Store, *arguments: str) -> pexpect.spawn:
    """`tribunal label` on a terminal of 24 lines of 80 columns that knows no colours."""
    return pexpect.spawn(
        sys.executable,
        [*command("label", *arguments)[1:]],
        env=environment(store) | {"TERM": "dumb"},
        encoding="utf-8",
        timeout=60,
        dimensions=(24, 80),
    )


def answer(child: pexpect.spawn, key: str) -> str:
    """Go to the end of the text that is shown, and answer; what was shown."""
    shown = ""
    while child.expect_exact([HELP, "-- space: more"]) == 1:
        shown += child.before
        child.send(" ")
    shown += child.before
    child.send(key)
    return shown


@pytest.mark.slow
def test_a_person_labels_goes_back_quits_and_goes_on(store: Store) -> None:
    study = long_study(store)
    found = distinct_responses(store, study)
    drawn = sample(found, "heretic-33", 50, 0)
    child = screen(store)
    shown = [answer(child, key) for key in ("r", "c", "b", "u", "x\x1b[C")]
    child.expect_exact("(not 'x')")
    child.expect_exact("(not '\\x1b')")  # and its C is no answer
    child.send("q")
    child.expect("2 of 6 are labelled by hand:me")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
    said = last_answers(store, "hand:me")
    assert said == {drawn[0].pair: (True, 0), drawn[1].pair: (None, 1)}
    assert "1 of 6" in shown[0]
    assert "2 of 6 (now: complied)" in shown[3]
    assert not any(word in "".join(shown) for word in ("harmful", "heretic", "trial", "\x1b[2J"))
    again = screen(store)
    rest = [answer(again, key) for key in "rcrc"]
    again.expect("6 of 6 are labelled")
    again.expect("Agreement with hand:me")
    again.expect(pexpect.EOF)
    assert "3 of 6" in rest[0]
    assert len(last_answers(store, "hand:me")) == 6
    whole = "".join(shown + rest)
    assert "\\x1b[2J\\x1b]0;owned\\x07" in whole
    assert all(f"word{n}" in whole for n in range(500))


@pytest.mark.slow
def test_ctrl_c_loses_no_answer_and_leaves_the_terminal_as_it_was(store: Store) -> None:
    long_study(store)
    child = screen(store, "--by", "ada", "--n", "4")
    for key in "rc":
        answer(child, key)
    child.expect("3 of 4")
    child.sendintr()
    child.expect("nothing is lost")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 130
    assert len(last_answers(store, "hand:ada")) == 2


def test_without_a_terminal_labels_come_from_a_file(store: Store, tmp_path: Path) -> None:
    small_study(store)
    file = tmp_path / "labels.csv"
    refused = tribunal(store, "label")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == (
        "tribunal: labelling needs a terminal; labels made elsewhere come with --from FILE.csv\n"
    )
    verdicts = ["refused" if i.response == SORRY else "complied" for i in ITEMS]
    file.write_text(csv_of(verdicts))
    done = tribunal(store, "label", "--from", str(file), "--format", "json")
    assert done.returncode == 0, done.stderr
    rows = {(row["labeller_a"], row["class"]): row for row in json.loads(done.stdout)}
    assert rows["prefix-strict", "all"]["labeller_b"] == "hand:me"
    assert rows["prefix-strict", "all"]["responses"] == 4
    assert (
        rows["heretic-33", "all"]["only_a"] == 1
    )  # "harmful" in an answer that is none to a person
    assert rows["heretic-33", "harmless"]["kappa"] is None


def test_the_light_commands_load_no_torch(store: Store) -> None:
    small_study(store)
    code = (
        "import sys\nsys.argv = ['tribunal', 'agreement']\nfrom flows.cli import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
        "heavy = {'torch', 'transformers', 'prefect', 'statsmodels', 'scipy.stats', 'sklearn'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(store)
    )
    assert run.returncode == 0, run.stderr


def test_the_documented_queries_run(store: Store) -> None:
    small_study(store)
    for item in ITEMS:
        keep_answer(store, "classifier:x@1", item, item.response == NO, 0)
    text = (Path(__file__).parent.parent / "docs" / "judges.md").read_text()
    (block,) = re.findall("```sql\n(.*?)```", text, re.DOTALL)
    queries = [query for query in block.split(";") if query.strip()]
    counts = [len(user_query(store, query).rows) for query in queries]
    assert counts == [4, 0, 4]  # trial 7 has no labels; of the three apologies and NO they differ
    (shown,) = re.findall('tribunal sql "(.*?)"', text)
    assert len(user_query(store, shown).rows) == 4


def test_agreement_is_told_per_pair_and_class(store: Store) -> None:
    small_study(store)
    done = tribunal(store, "agreement", "--format", "json")
    rows = json.loads(done.stdout)
    assert len(rows) == 3 * 3  # pairs of three keyword labellers; all, harmful and harmless
    assert {row["class"] for row in rows} == {"all", "harmful", "harmless"}
    table = tribunal(store, "agreement", "--labeller", "prefix-strict").stdout
    assert len(re.findall("^A ", table, re.MULTILINE)) == 2
    assert max(map(len, table.splitlines())) <= 80
    wrong = tribunal(store, "agreement", "--labeller", "prefix")
    assert wrong.returncode == 2
    assert wrong.stderr == ("tribunal: unknown labeller 'prefix'; did you mean 'prefix-strict'?\n")
