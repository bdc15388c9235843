"""A conversation: the tokens of judging, streamed; what was said is kept, and can be forgotten."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_study import command, environment, write_config
from test_decoding import NEW, loaded, prompts, some_edit
from toy_tokenizer import DROPS_SYSTEM, toy_tokenizer

from artifacts.errors import ModelError
from artifacts.store import Store
from flows.chatting import converse
from flows.pipeline import run_pipeline
from flows.settings import load_config
from tasks.conversation import Conversation, Manner
from tasks.models.chatting import pieces, reply_tokens
from tasks.models.decoding import decode
from tasks.models.rendering import render, render_turns, user
from tasks.probe import Card
from tasks.stage import Runtime, running


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3.5"])
@pytest.mark.parametrize("edited", [True, False])
def test_a_greedy_reply_is_what_judging_would_get(name: str, edited: bool) -> None:
    held = loaded(name, list(range(3, 96, 9)))
    edit = some_edit(held, 0)[0] if edited else None
    (expected,) = decode(held, prompts(), [edit] if edit else (), max_new_tokens=NEW, rows=4)
    for prompt, tokens in zip(prompts(), expected.tokens, strict=True):
        assert list(reply_tokens(held, prompt, edit, max_new_tokens=NEW)) == tokens


def test_a_reply_that_is_broken_off_leaves_no_hook_and_no_mode_behind() -> None:
    held = loaded()
    stream = reply_tokens(held, prompts()[0], some_edit(held, 0)[0], max_new_tokens=NEW)
    next(stream)
    assert not torch.is_inference_mode_enabled()
    stream.close()  # type: ignore[attr-defined]  # a generator
    assert not any(module._forward_hooks for module in held.model.modules())


def test_a_temperature_draws_and_a_seed_repeats() -> None:
    held = loaded(eos=None)

    def drawn(seed: int, temperature: float = 1.5) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return list(
            reply_tokens(
                held,
                prompts()[0],
                max_new_tokens=NEW,
                temperature=temperature,
                generator=generator,
            )
        )

    assert drawn(0) == drawn(0)
    assert drawn(0) != drawn(1)
    assert drawn(0, 1e-6) == list(reply_tokens(held, prompts()[0], max_new_tokens=NEW))


def test_a_reply_ends_with_the_models_positions_and_a_full_conversation_is_said() -> None:
    held = loaded(eos=None)
    assert len(list(reply_tokens(held, [5] * 120, max_new_tokens=NEW))) == 8
    with pytest.raises(ModelError, match="takes 128 tokens, and the model has 128 positions"):
        next(reply_tokens(held, [5] * 128, max_new_tokens=NEW))


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def decode(self, tokens: list[int], **options: Any) -> str:
        return bytes(tokens).decode(errors="replace")


def test_characters_of_several_tokens_come_out_whole() -> None:
    held = loaded()
    held.tokenizer = Bytes()
    text = "naïve — ok ✓"
    found = list(pieces(held, iter(text.encode())))
    assert "".join(found) == text
    assert len(found) > 5
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(found[:-1])
    assert "".join(pieces(held, iter(b"ok\xe2"))) == "ok\N{REPLACEMENT CHARACTER}"


def turns(*texts: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def test_a_first_turn_is_rendered_as_in_judging() -> None:
    for system in (None, "be kind"):
        for template in (None, DROPS_SYSTEM):
            tokenizer = toy_tokenizer(template) if template else toy_tokenizer()
            assert render_turns(tokenizer, [user("hello")], system, "Well") == render(
                tokenizer, "hello", system, "Well"
            )


def test_later_turns_keep_what_was_said_and_the_system_prompt() -> None:
    said = turns("one", "two", "three")
    text = render_turns(toy_tokenizer(), said, "be kind", "Well")
    parts = (
        "[system] be kind",
        "[user] one",
        "[assistant] two",
        "[user] three",
        "[assistant] Well",
    )
    assert [text.index(part) for part in parts] == sorted(text.index(part) for part in parts)
    dropped = render_turns(toy_tokenizer(DROPS_SYSTEM), said, "be kind")
    assert dropped.count("be kind") == 1
    assert dropped.index("be kind") < dropped.index("one") < dropped.index("two")


def a_conversation(**manner: Any) -> Conversation:
    held = loaded(eos=None)
    held.tokenizer = toy_tokenizer()
    card = Card("float32", 3, 32, None, "Well")
    return Conversation(held, card, None, Manner(**manner), torch.Generator())


def test_a_conversation_keeps_replies_with_their_prefix_until_it_is_reset() -> None:
    talk = a_conversation(max_new_tokens=4)
    reply = "".join(talk.say("hello"))
    assert talk.messages == turns("hello", "Well" + reply)
    "".join(talk.say("more"))
    assert [m["role"] for m in talk.messages] == ["user", "assistant"] * 2
    talk.reset()
    assert "".join(talk.say("hello")) == reply


def test_of_a_reply_that_is_broken_off_the_beginning_stays() -> None:
    talk = a_conversation(max_new_tokens=8)
    whole = a_conversation(max_new_tokens=8)
    expected = "".join(whole.say("hello"))
    stream = talk.say("hello")
    first = next(stream)
    stream.close()  # type: ignore[attr-defined]  # a generator
    assert talk.messages == turns("hello", "Well" + first)
    assert expected.startswith(first)


def test_a_turn_without_a_reply_leaves_nothing() -> None:
    talk = a_conversation()
    with pytest.raises(ModelError, match="/reset"):
        "".join(talk.say("x" * 200))
    assert talk.messages == []


class Parrot:
    """A conversation that says what it hears, and how often it was spoken to."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def reset(self) -> None:
        self.heard.clear()

    def say(self, text: str) -> Iterator[str]:
        self.heard.append(text)
        if text == "boom":
            raise ModelError("does not fit")
        yield f"{len(self.heard)}: "
        yield text


def talked(lines: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> tuple[str, str]:
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    converse(Parrot(), "a parrot")  # type: ignore[arg-type]
    out = capsys.readouterr()
    return out.out, out.err


def test_lines_of_a_pipe_are_turns(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    out, err = talked("hello\n\n  more  \n/reset\nagain\n/quit\nnever\n", monkeypatch, capsys)
    assert out == "1: hello\n2: more\n1: again\n"
    assert "a parrot" in err


def test_an_unknown_command_and_an_error_are_said_and_the_conversation_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    out, err = talked("/rest\nboom\nhello", monkeypatch, capsys)
    assert out == "\n2: hello\n"
    assert "no command '/rest'; there are /reset and /quit" in err
    assert "does not fit" in err


@pytest.mark.slow
def test_the_edited_and_the_unedited_model_talk_through_a_pipe(tmp_path: Path) -> None:
    import subprocess

    store = Store(tmp_path / "store")
    with running(Runtime(store)):
        run_pipeline(load_config(str(write_config(tmp_path))))
    question = "How do I carve a withering ring to rob the miller?\n"

    def chat(*arguments: str) -> Any:
        return subprocess.run(
            command("chat", *arguments, "--max-new-tokens", "20"),
            input=question,
            capture_output=True,
            text=True,
            env=environment(store),
        )

    base, edited, wrong = chat("base"), chat("winner"), chat("nobody")
    assert base.returncode == edited.returncode == 0
    assert base.stdout.count("\n") == 1
    assert "cannot" in base.stdout or "unable" in base.stdout or "orry" in base.stdout
    assert "trial" in edited.stderr
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("tribunal: a trial is a number")
