"""A judge behind an OpenAI-compatible endpoint: asked in words, answers in one of two lines.

Prompts and responses leave the machine, so an endpoint is asked only when the user names it. The
key travels in a header and nowhere else: no identity, artifact, log or error holds it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from importlib import resources
from threading import Event
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from artifacts.errors import ConfigError, JudgeError, one_line
from artifacts.keys import Json, digest
from tasks.judges.asking import Answer, Item, Pair, Verdict
from tasks.judges.classifier import fill

if TYPE_CHECKING:
    import httpx

KEY = "TRIBUNAL_JUDGE_KEY"
BUSY = {408, 409, 425, 429, 500, 502, 503, 504}  # asked again later
DENIED = {401, 403}
TRIES = 6
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds between tries; doubled each time
TIMEOUT = 120.0  # seconds for one answer
MAX_TOKENS = 512  # of an answer: a judge may think aloud before its verdict
_THOUGHTS = re.compile(r"<think>.*?</think>", re.DOTALL | re.IGNORECASE)
_VERDICT = re.compile(r"^\W*VERDICT\W+(REFUSED|COMPLIED)\W*$", re.MULTILINE | re.IGNORECASE)


def question() -> str:
    """The published template: what a judge is asked, with places for prompt and response."""
    return resources.files("tasks.judges").joinpath("question.md").read_text()


def verdict_of(reply: str) -> bool | None:
    """Whether a reply says REFUSED; None unless it says one of the two verdicts and no other."""
    said = {word.upper() for word in _VERDICT.findall(_THOUGHTS.sub("", reply))}
    return said == {"REFUSED"} if len(said) == 1 else None


class _Stopped(Exception):
    """A question that was not sent, because another one failed."""


@dataclass(frozen=True)
class EndpointJudge:
    """A model that a server calls by a name.

    Attributes:
        url: up to and without /chat/completions.
        model: the server's name for it. Name, address and question decide the verdicts.
        key: of the server, if it wants one.
        concurrency: questions under way at once.
        trust_env: use the environment's proxies and certificates.
        first_wait: seconds before the second try.
    """

    url: str
    model: str
    key: str | None = field(default=None, repr=False, compare=False)
    concurrency: int = field(default=4, compare=False)
    trust_env: bool = field(default=True, compare=False)
    first_wait: float = field(default=FIRST_WAIT, compare=False)

    kept_together = 32

    @cached_property
    def labeller(self) -> str:
        plain = re.sub(r"[^\w.:-]", "-", self.model.rpartition("/")[2])
        return f"endpoint:{plain}@{digest(self.identity)[:8]}"

    @property
    def identity(self) -> dict[str, Json]:
        return {
            "judge": "endpoint",
            "version": 1,
            "url": self.url,
            "model": self.model,
            "question": hashlib.sha256(question().encode()).hexdigest(),
            "max_tokens": MAX_TOKENS,
        }

    def derived(self, stored: Mapping[str, Mapping[Pair, Answer]]) -> dict[Pair, Verdict]:
        """Nothing: no other judge's answer is this one's."""
        return {}

    def ask(self, items: Sequence[Item]) -> Generator[tuple[Item, Verdict]]:
        """Ask about each item; several questions are under way at once.

        When one fails, or the caller is interrupted, no new question is sent, and those that were
        answered meanwhile still come.

        Raises:
            JudgeError: the endpoint cannot be reached, refuses, or speaks another language.
            StoreError: a prompt is no longer stored.
        """
        import httpx

        template = question()
        bodies = [self._body(template, item) for item in items]
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        stop = Event()
        with (
            httpx.Client(headers=headers, timeout=TIMEOUT, trust_env=self.trust_env) as client,
            ThreadPoolExecutor(self.concurrency) as pool,
        ):
            try:
                yield from self._answers(client, pool, items, bodies, stop)
            finally:
                stop.set()
                pool.shutdown(cancel_futures=True)

    def _answers(
        self,
        client: httpx.Client,
        pool: ThreadPoolExecutor,
        items: Sequence[Item],
        bodies: Sequence[dict[str, Any]],
        stop: Event,
    ) -> Generator[tuple[Item, Verdict]]:
        """Answers as they come; after a failure, those that had come too, then the failure."""
        under_way: dict[Future[Verdict], Item] = {}
        waiting = iter(zip(items, bodies, strict=True))

        def send() -> None:
            for item, body in waiting:
                under_way[pool.submit(self._ask, client, body, stop)] = item
                if len(under_way) >= 2 * self.concurrency:
                    return

        try:
            send()
            while under_way:
                finished, _ = wait(under_way, return_when=FIRST_COMPLETED)
                for future in sorted(finished, key=lambda f: f.exception() is not None):
                    if isinstance(future.exception(), _Stopped):  # by another's failure: it comes
                        del under_way[future]
                        continue
                    verdict = future.result()
                    yield under_way.pop(future), verdict
                send()
        except (Exception, KeyboardInterrupt):
            stop.set()
            pool.shutdown(cancel_futures=True)
            for future, item in under_way.items():
                if not future.cancelled() and future.exception() is None:
                    yield item, future.result()
            raise

    def _body(self, template: str, item: Item) -> dict[str, Any]:
        asked = fill(template, item, {"mark": item.response_digest[:8]})
        return {
            "model": self.model,
            "messages": [{"role": "user", "content": asked}],
            "temperature": 0,
            "max_tokens": MAX_TOKENS,
        }

    def _ask(self, client: httpx.Client, body: dict[str, Any], stop: Event) -> Verdict:
        """One answer; if there is none, no other question is sent."""
        try:
            return self._asked(client, body, stop)
        except JudgeError:
            stop.set()
            raise

    def _asked(self, client: httpx.Client, body: dict[str, Any], stop: Event) -> Verdict:
        """One answer, after as many tries as it takes."""
        import httpx

        pause, said = self.first_wait, "nothing"
        for number in range(TRIES):
            if stop.is_set() or (number and stop.wait(pause)):
                raise _Stopped
            try:
                answer = client.post(f"{self.url}/chat/completions", json=body)
            except httpx.RequestError as error:
                said = str(error) or type(error).__name__
            else:
                if answer.status_code not in BUSY:
                    return self._verdict(answer)
                said = f"answers {answer.status_code}"
                pause = max(pause, _asked_wait(answer))
            pause = min(2 * pause, LONGEST_WAIT) if number else pause
        raise JudgeError(
            f"the endpoint '{self.url}' cannot be asked now ({said}); what it answered is stored, "
            "and the same command goes on from here"
        )

    def _verdict(self, answer: httpx.Response) -> Verdict:
        """What an answer says.

        Raises:
            JudgeError: the request was refused, or the answer is no chat completion.
        """
        if answer.status_code in DENIED:
            raise JudgeError(
                f"the endpoint '{self.url}' answers {answer.status_code}: it "
                + (f"refuses the key in {KEY}" if self.key else f"wants a key; set {KEY}")
            )
        if answer.status_code != 200:
            raise JudgeError(
                f"the endpoint '{self.url}' answers {answer.status_code} to model "
                f"'{self.model}': {answer.text[:300]}"
            )
        try:
            reply = answer.json()["choices"][0]["message"]["content"] or ""
            refused = verdict_of(reply)
        except (ValueError, LookupError, TypeError) as error:
            raise JudgeError(
                f"the endpoint '{self.url}' answers with no chat completion but "
                f"'{answer.text[:200]}'; give the address up to /v1"
            ) from error
        return Verdict(refused, reply=one_line(reply))


def _asked_wait(answer: httpx.Response) -> float:
    """Seconds that a busy server asks for, within reason; 0 where it does not say."""
    with suppress(ValueError):
        return min(float(answer.headers.get("Retry-After", 0)), LONGEST_WAIT)
    return 0.0


def require_url(url: str) -> str:
    """An endpoint's address without its last slash.

    Raises:
        ConfigError: it is no http address, or has a key in it.
    """
    plain = url.strip().rstrip("/").removesuffix("/chat/completions")
    try:
        parts = urlsplit(plain)
        whole = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        whole = False
    if not whole or any(char.isspace() or not char.isprintable() for char in plain):
        raise ConfigError(
            f"--endpoint takes an address as in http://127.0.0.1:8000/v1, not '{url}'"
        )
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ConfigError(f"--endpoint takes an address and nothing secret in it; set {KEY}")
    return plain


def require_key(key: str | None) -> str | None:
    """The key as it can be sent; None if there is none.

    Raises:
        ConfigError: it cannot be part of a header.
    """
    plain = (key or "").strip()
    if not (plain.isascii() and plain.isprintable()):
        raise ConfigError(f"{KEY} has characters that no header can hold; copy the key again")
    return plain or None
