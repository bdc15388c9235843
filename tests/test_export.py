"""An export is the trial, or there is no export: audits, refusals, cards, uploads, clean places."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from small_study import command, environment, write_config

from artifacts.errors import ConfigError, ExportError, ModelError, TribunalError
from artifacts.store import Store
from flows import export_commands, results
from flows.cli import app
from flows.pipeline import run_pipeline
from flows.settings import load_config, validate
from tasks import export, hub_upload
from tasks.export import Audit, Wish, export_trial, refuse_differences
from tasks.model_card import config_text
from tasks.models import adapters, exporting
from tasks.models.identity import ORGANISM
from tasks.stage import Runtime, running
from tasks.stored_trials import StoredTrial, stored_trial
from tasks.whole_folder import whole_folder

Form = Any


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """One finished study, not changed by the tests below."""
    return studied(tmp_path_factory.mktemp("export"))


def studied(folder: Path, *overrides: str, name: str = "small") -> Store:
    made = Store(folder / "store")
    with running(Runtime(made)):
        run_pipeline(load_config(str(write_config(folder, name)), overrides))
    return made


def trial(store: Store, number: int = 1) -> StoredTrial:
    return stored_trial(store, results.find_study(store, None), number, validate)


def exported(store: Store, folder: Path, wish: Wish | None = None) -> export.Exported:
    with running(Runtime(store)):
        return export_trial(trial(store), folder, wish or Wish(), lambda written, audit: "a card\n")


@pytest.fixture
def tribunal(
    store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """The command line in this process; what it prints."""
    monkeypatch.setenv("TRIBUNAL_STORE", store.location)
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments: str) -> str:
        app(list(arguments), standalone_mode=False)
        return capsys.readouterr().out

    return run


# What an export is


@pytest.mark.parametrize("form", ["merged", "adapter"])
def test_in_float32_an_export_measures_as_its_trial(
    form: Form, store: Store, tmp_path: Path
) -> None:
    found = exported(store, tmp_path / "out", Wish(form, "float32"))
    audit = found.audit
    assert audit.exact
    assert (audit.changed, audit.changed_since) == (0, 0)
    assert audit.stored["kl"] == audit.now["kl"] > 0
    assert audit.exported["kl"] == pytest.approx(audit.now["kl"], abs=1e-6)
    assert 0 <= audit.kl_to_trial < 1e-9
    if form == "adapter":
        assert set(found.written.ranks.values()) == {1}
        assert found.written.error < 1e-6


def test_by_default_weights_are_stored_as_the_checkpoint_is_and_rounding_is_told(
    store: Store, tmp_path: Path
) -> None:
    found = exported(store, tmp_path / "out")
    assert found.written.dtype == "bfloat16"
    assert not found.audit.exact
    assert 1e-9 < found.audit.kl_to_trial < export.CLOSE
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert {str(tensor.dtype) for tensor in weights.values()} == {"torch.bfloat16"}
    stored = load_file(ORGANISM / "model.safetensors")
    same = [name for name in stored if stored[name].equal(weights[name])]
    assert 0 < len(same) < len(stored)
    assert all(
        name.endswith(("o_proj.weight", "down_proj.weight")) for name in stored.keys() - same
    )


def test_a_folder_holds_no_pickle_and_no_path_of_this_machine(store: Store, tmp_path: Path) -> None:
    for form in ("merged", "adapter"):
        folder = tmp_path / form
        exported(store, folder, Wish(form))  # type: ignore[arg-type]
        for path in folder.iterdir():
            assert path.suffix in {".json", ".safetensors", ".jinja", ".md"}
            assert path.stat().st_mode & 0o777 == (folder / "README.md").stat().st_mode & 0o777
            for place in (str(ORGANISM), str(tmp_path), str(Path.home())):
                assert place.encode() not in path.read_bytes(), path


@pytest.mark.slow
def test_an_adapter_of_an_edit_that_keeps_norms_states_its_error(tmp_path: Path) -> None:
    made = studied(tmp_path, 'edit.row_normalization="full"')
    near = exported(made, tmp_path / "near", Wish("adapter", None, 1e-4))
    far = exported(made, tmp_path / "far", Wish("adapter", None, 0.03))
    assert near.written.error <= 1e-4 < far.written.error <= 0.03
    assert max(far.written.ranks.values()) < max(near.written.ranks.values())
    assert near.audit.kl_to_trial < far.audit.kl_to_trial
    assert not near.audit.exact


@pytest.mark.slow
def test_a_study_in_bfloat16_is_exported_in_bfloat16_and_in_float32(tmp_path: Path) -> None:
    made = studied(tmp_path, 'model.dtype=["bfloat16"]')
    for dtype in (None, "float32"):
        found = exported(made, tmp_path / f"out-{dtype}", Wish("merged", dtype))
        assert found.written.dtype == (dtype or "bfloat16")
        assert not found.audit.exact
        assert found.audit.kl_to_trial < export.CLOSE
    exported(made, tmp_path / "adapter", Wish("adapter"))


@pytest.mark.slow
def test_a_model_folder_is_known_by_its_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "village"
    shutil.copytree(ORGANISM, folder)
    made = studied(tmp_path, f'model.id="{folder}"')
    assert export.base_name(trial(made)) == "village"
    exported(made, tmp_path / "out")
    monkeypatch.setattr("tasks.probe._identities", {})  # which a process looks up once
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    with pytest.raises(ModelError, match="is not the one that study 'small-"):
        assert trial(made).spec


# What is no export: nothing stays


def tampered(change: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let something happen to a folder between its writing and its reading."""
    for module, name in ((exporting, "write_model"), (adapters, "write_adapter")):
        write = getattr(module, name)

        def and_change(*args: Any, write: Any = write, **options: Any) -> None:
            write(*args, **options)
            change(next(a for a in args if isinstance(a, Path)))

        monkeypatch.setattr(module, name, and_change)


def negate_one_tensor(folder: Path) -> None:
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    name = sorted(tensors)[-1]
    save_file(tensors | {name: -tensors[name]}, path, metadata={"format": "pt"})


def other_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")


def cut_short(folder: Path) -> None:
    (path,) = folder.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-100])


def other_norm(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))


@pytest.mark.parametrize(
    ("form", "change", "said"),
    [
        ("merged", negate_one_tensor, "1 of 75 tensors are not what was to be written"),
        ("merged", other_template, "makes other tokens"),
        ("merged", cut_short, "cannot load"),
        ("merged", other_norm, "what was written does not measure as the trial does"),
        ("adapter", negate_one_tensor, "does not hold what was to be written"),
    ],
)
def test_a_folder_that_was_tampered_with_is_no_export(
    form: Form,
    change: Callable[[Path], None],
    said: str,
    store: Store,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tampered(change, monkeypatch)
    with pytest.raises(TribunalError, match=said):
        exported(store, tmp_path / "out", Wish(form, "float32"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), MemoryError(), OSError(28, "No space left")]
)
def test_whatever_ends_the_writing_nothing_stays(error: BaseException, tmp_path: Path) -> None:
    def write() -> None:
        with whole_folder(tmp_path / "deep" / "er" / "out") as partial:
            (partial / "file").write_text("half")
            raise error

    expected = ExportError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected, match="no space left" if isinstance(error, OSError) else None):
        write()
    assert not list(tmp_path.iterdir())


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let no file of this process grow beyond `size` bytes, as on a disk that is full then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


@pytest.mark.parametrize("form", ["merged", "adapter"])
def test_a_full_disk_is_one_line_and_nothing_stays(
    form: Form, store: Store, tmp_path: Path
) -> None:
    with largest_file(20_000), pytest.raises(ExportError, match=r"cannot write .* too large"):
        exported(store, tmp_path / "out", Wish(form, "float32"))
    assert not list(tmp_path.iterdir())


def test_the_edited_model_does_not_stay_in_memory(store: Store, tmp_path: Path) -> None:
    exported(store, tmp_path / "out")
    with running(Runtime(store)):
        _, base = trial(store).court()
        again = export.answer(trial(store).court()[0].bench)
    assert [row["response"] for row in again.rows] == [row["response"] for row in base.rows]


@pytest.mark.parametrize("taken", ["file", "folder"])
def test_what_is_there_stays_as_it_is(
    taken: str, tribunal: Callable[..., str], tmp_path: Path
) -> None:
    place = tmp_path / "out"
    inside = place / "mine.txt" if taken == "folder" else place
    inside.parent.mkdir(exist_ok=True)
    inside.write_text("mine")
    with pytest.raises(ExportError, match=r"is not empty|is a file"):
        tribunal("export", "1", str(place))
    assert inside.read_text() == "mine"


def test_an_empty_folder_is_filled_and_a_link_to_one_is_followed(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there")
    with whole_folder(tmp_path / "link") as partial:
        assert partial.parent == tmp_path
        (partial / "file").write_text("new")
    assert (tmp_path / "there" / "file").read_text() == "new"
    assert (tmp_path / "link").is_symlink()


def test_a_folder_that_is_filled_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    def write() -> None:
        with whole_folder(tmp_path / "out") as partial:
            (partial / "file").write_text("new")
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "theirs").write_text("old")

    with pytest.raises(ExportError, match="not empty"):
        write()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "theirs"]


def test_quantised_studies_are_refused_before_anything_is_loaded(
    store: Store, tmp_path: Path
) -> None:
    found = trial(store)
    model = found.config.model.model_copy(update={"quantization": "bnb-4bit"})
    packed = replace(found, config=found.config.model_copy(update={"model": model}))
    with pytest.raises(ModelError, match="packed weights cannot carry an edit"):
        export_trial(packed, tmp_path / "out", Wish(), lambda written, audit: "")
    assert not list(tmp_path.iterdir())


# The rule of the audit


def an_audit(**changes: Any) -> Audit:
    row = {
        "refusals": 1,
        "n_harmful": 100,
        "overrefusals": 2,
        "n_harmless": 100,
        "n_borderline": 0,
        "kl": 0.01,
        "refusals_interval": (0.0003, 0.054),
        "overrefusals_interval": (0.002, 0.07),
        "kl_interval": (0.007, 0.014),
    }
    audit = Audit(row, row, row, row, 0.0, 0, 0, 200, exact=True)
    for name, value in changes.items():
        if name in row:
            audit = replace(audit, exported={**audit.exported, name: value})
        else:
            audit = replace(audit, **{name: value})
    return audit


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"refusals": 2}, "refusals 1 and then 2"),
        ({"overrefusals": 1}, "overrefusals 2 and then 1"),
        ({"kl": 0.010002}, "KL 0.01 and then 0.010002"),
        ({"kl": float("nan")}, "KL 0.01 and then nan"),
        ({"changed": 3}, "3 of 200 responses differ"),
        ({"kl_to_trial": 2e-6}, "first tokens lie 2e-06 nats"),
        ({"exact": False, "refusals": 6}, "refusals 1 and then 6, outside its 95 % interval"),
        ({"exact": False, "kl": 0.015}, "kl 0.01 and then 0.015, outside"),
        ({"exact": False, "kl_to_trial": 2e-3}, "first tokens lie 0.002 nats"),
        ({"exact": False, "kl_to_trial": float("nan")}, "first tokens lie nan nats"),
    ],
)
def test_what_differs_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ExportError, match=said):
        refuse_differences(an_audit(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"kl": 0.0100009, "changed": 2, "kl_to_trial": 9e-7},
        {"exact": False, "refusals": 3, "kl": 0.012, "changed": 50, "kl_to_trial": 9e-4},
    ],
)
def test_what_rounding_explains_is_not_refused(changes: dict[str, Any]) -> None:
    refuse_differences(an_audit(**changes))


def test_a_trial_that_changed_since_its_study_is_told_from_a_bad_export() -> None:
    audit = an_audit()
    moved = replace(audit, stored={**audit.stored, "refusals": 0})
    with pytest.raises(ExportError, match=r"the trial itself .* tribunal rebenchmark"):
        refuse_differences(moved)


# The card


def test_the_card_tells_every_parameter_and_every_measurement(
    tribunal: Callable[..., str], store: Store, tmp_path: Path
) -> None:
    tribunal("export", "winner", str(tmp_path / "out"))
    card = (tmp_path / "out" / "README.md").read_text()
    number = results.frozen(store, results.find_study(store, None))
    assert number is not None
    found = trial(store, number)
    for name, value in found.trial.parameters.items():
        assert (f"| {name} | {value} |" in card) == (value is not None)
    for split in (
        "search, unedited",
        "search, by the study",
        "selection",
        "test",
        "search, by these",
    ):
        assert f"| {split}" in card
    for known in (found.protocol.key, found.study, "torch ", "heretic-33", "row_normalization"):
        assert known in card
    data = ModelCard(card).data
    assert (data.license, data.library_name) == ("unknown", "transformers")
    text = card.split("```toml\n")[1].split("```")[0]
    assert validate(tomllib.loads(text)) == found.config


def test_the_config_of_a_card_holds_no_path(store: Store) -> None:
    config = trial(store).config
    model = config.model.model_copy(update={"id": "/home/someone/models/village"})
    text = config_text(config.model_copy(update={"model": model}))
    assert 'id = "village"' in text
    assert "someone" not in text


def test_an_adapter_that_rounding_takes_beyond_its_error_is_refused(
    store: Store, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=r"error 0\.00\d+ of the change, more than 0\.001"):
        exported(store, tmp_path / "out", Wish("adapter", "bfloat16"))
    assert not list(tmp_path.iterdir())
    assert exported(store, tmp_path / "out", Wish("adapter", "bfloat16", 0.01)).written.error > 1e-3


def test_an_adapters_card_tells_ranks_and_error(
    tribunal: Callable[..., str], tmp_path: Path
) -> None:
    tribunal("export", "1", str(tmp_path / "out"), "--as", "adapter")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "rank 1, stored in float32. Relative Frobenius error" in card
    assert ModelCard(card).data.library_name == "peft"


# The command


def test_the_answer_is_a_table_or_json(tribunal: Callable[..., str], tmp_path: Path) -> None:
    table = tribunal("export", "1", str(tmp_path / "a"), "--dtype", "float32")
    assert "trial, by the study" in table
    assert "as exported" in table
    assert max(map(len, table.splitlines())) <= max(80, len(str(tmp_path)) + 40)
    text = tribunal("export", "1", str(tmp_path / "b"), "--as", "adapter", "--format", "json")
    answer = json.loads(text)
    assert (answer["as"], answer["dtype"], answer["pushed"]) == ("adapter", "float32", None)
    assert answer["measured"]["exported"]["n_harmful"] == 8
    assert set(answer["files"]) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}


def test_trials_are_named_as_in_show(store: Store) -> None:
    study = results.find_study(store, None)
    winner = results.frozen(store, study)
    assert winner is not None
    assert results.find_trial(store, "2") == (study, 2)
    assert results.find_trial(store, "small/2") == (study, 2)
    assert results.find_trial(store, "2", "small") == (study, 2)
    assert results.find_trial(store, "winner") == (study, winner)
    assert results.find_trial(store, f"{study}/winner") == (study, winner)
    for wrong in ("x", "small/", "-1", "²", "1.5"):
        with pytest.raises(ConfigError, match="a trial is a number"):
            results.find_trial(store, wrong)
    with pytest.raises(ConfigError, match="both name a study"):
        results.find_trial(store, "small/2", "small")


def test_a_trial_that_is_not_there_is_said(tribunal: Callable[..., str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no trial '99'"):
        tribunal("export", "99", str(tmp_path / "out"))


# Uploads


class Hub:
    """A hub that remembers what it was asked."""

    def __init__(self, private: bool = True, error: Exception | None = None) -> None:
        self.private, self.error = private, error
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def create_repo(self, repo: str, **options: Any) -> None:
        self.calls.append(("create", {"repo": repo, **options}))
        if self.error:
            raise self.error

    def repo_info(self, repo: str) -> Any:
        return SimpleNamespace(private=self.private)

    def upload_folder(self, **options: Any) -> Any:
        self.calls.append(("upload", options))
        return SimpleNamespace(commit_url=f"https://hub/{options['repo_id']}")


@pytest.mark.parametrize("public", [False, True])
def test_an_export_is_pushed_private_unless_asked(
    public: bool, tribunal: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(private=not public)
    monkeypatch.setattr(hub_upload, "hub", lambda: hub)
    more = ["--public"] if public else []
    out = tribunal("export", "1", str(tmp_path / "out"), "--push", "me/edited", *more)
    (made, created), (done, sent) = hub.calls
    assert (made, done) == ("create", "upload")
    assert created == {"repo": "me/edited", "private": not public, "exist_ok": True}
    assert sent["folder_path"] == str(tmp_path / "out")
    assert "https://hub/me/edited" in out


def test_nothing_private_goes_to_a_public_repository(tmp_path: Path) -> None:
    hub = Hub(private=False)
    with pytest.raises(ExportError, match="is public"):
        hub_upload.upload(tmp_path, "me/edited", False, "message", hub)
    assert [name for name, _ in hub.calls] == ["create"]


def test_what_the_hub_says_is_one_line_and_the_folder_stays(tmp_path: Path) -> None:
    token = "hf_" + "a" * 30
    hub = Hub(error=OSError(f"401 Unauthorized {token}\nmore\nlines"))
    with pytest.raises(ExportError, match="401 Unauthorized") as caught:
        hub_upload.upload(tmp_path, "me/edited", False, "message", hub)
    assert "\n" not in str(caught.value)
    assert token not in str(caught.value)
    assert "hf upload me/edited" in str(caught.value)


def test_a_hub_that_is_not_there_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import HfApi

    hub = HfApi(endpoint="http://127.0.0.1:9", token="hf_" + "a" * 30)
    with pytest.raises(ExportError, match="the hub did not take 'me/edited'"):
        hub_upload.upload(tmp_path, "me/edited", False, "message", hub)


def test_an_upload_needs_a_name_and_a_token_before_anything_is_computed(
    tribunal: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(export_commands, "_exported", pytest.fail)
    place = str(tmp_path / "out")
    with pytest.raises(ExportError, match="HF_TOKEN"):
        tribunal("export", "1", place, "--push", "me/edited")
    monkeypatch.setenv("HF_TOKEN", "hf_" + "a" * 30)
    assert hub_upload.hub().token == "hf_" + "a" * 30
    with pytest.raises(ExportError, match="--push 'a b'"):
        tribunal("export", "1", place, "--push", "a b")
    with pytest.raises(ConfigError, match="--public"):
        tribunal("export", "1", place, "--public")


# As a process


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_export_leaves_nothing(number: int, store: Store, tmp_path: Path) -> None:
    process = subprocess.Popen(
        command("export", "1", str(tmp_path / "out")),
        env=environment(store),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_mistakes_are_one_line_and_exit_code_two(store: Store, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    whole = environment(store)
    whole = {name: value for name, value in whole.items() if name != "HF_TOKEN"}
    for arguments in (
        ["1", str(tmp_path)],
        ["99", str(tmp_path / "out")],
        ["1", str(tmp_path / "mine" / "out")],
        ["1", str(tmp_path / "out"), "--push", "me/edited"],
    ):
        done = subprocess.run(
            command("export", *arguments), capture_output=True, text=True, env=whole
        )
        last = done.stderr.splitlines()[-1]
        assert (done.returncode, last.startswith("tribunal: ")) == (2, True), done.stderr
        assert "Traceback" not in done.stderr
    assert os.listdir(tmp_path) == ["mine"]
