"""The size of a pass is measured once, kept, and never larger than memory allows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_decoding import loaded

from tasks.models import chunk_probe
from tasks.models.chunk_probe import SIZES, cache_file, measure, tokens_per_pass


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def timed(monkeypatch: pytest.MonkeyPatch, seconds: dict[int, float]) -> list[int]:
    """Let passes take these seconds; returns the sizes that are tried."""
    tried: list[int] = []

    def fake(_: object, tokens: int) -> float:
        tried.append(tokens)
        return seconds[tokens]

    monkeypatch.setattr(chunk_probe, "_timed", fake)
    return tried


def test_the_fastest_size_per_token_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = timed(monkeypatch, {512: 0.010, 1024: 0.016, 2048: 0.030, 4096: 0.090})
    assert measure(loaded()) == 2048
    assert set(tried) == {512, 1024, 2048, 4096}, "nothing larger once it becomes slower"


def test_a_slow_model_is_not_probed_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = timed(monkeypatch, {512: 0.9})
    assert measure(loaded()) == 512
    assert tried == [512, 512]


def test_what_was_measured_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = timed(monkeypatch, {512: 0.010, 1024: 0.018, 2048: 0.050})
    assert [tokens_per_pass(loaded()) for _ in range(2)] == [1024, 1024]
    assert len(tried) == 6
    assert list(json.loads(cache_file().read_text()).values()) == [1024]


@pytest.mark.parametrize("broken", ["", "[1]", '{"a": "b"}', '{"a": -1}'])
def test_a_broken_cache_is_measured_anew(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, {512: 0.010, 1024: 0.050})
    cache_file().parent.mkdir(parents=True)
    cache_file().write_text(broken)
    assert tokens_per_pass(loaded()) == 512


def test_a_cache_that_cannot_be_written_costs_nothing_else(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    timed(monkeypatch, {512: 0.010, 1024: 0.050})
    (tmp_path / "tribunal").write_text("a file where the folder should be")
    assert tokens_per_pass(loaded()) == 512


def test_logits_have_to_fit_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, dict.fromkeys(SIZES, 0.001))
    vocabulary = loaded().model.config.vocab_size
    free = 4 * vocabulary * 1024 / chunk_probe.LOGITS_SHARE
    monkeypatch.setattr("tasks.models.engine.free_memory", lambda _: int(free))
    assert measure(loaded()) == 1024
    assert tokens_per_pass(loaded()) == 1024
