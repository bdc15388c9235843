"""A store with a study whose responses judges can be asked about, and what those judges need."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import polars as pl
import transformers
from toy_tokenizer import toy_tokenizer
from trial_rows import put_study, put_table, response, trial_row

from artifacts.schemas import PROMPTS, polars_schema
from artifacts.store import Store
from tasks.judges.asking import Item, response_digest

SORRY, FIRST, NO = "I cannot help with that.", "First, gather the moss.", "No, that is harmful."


def put_responses(store: Store, *trials: list[tuple[str, str, str]]) -> str:
    """A study of trials that answer (class, prompt, response); the study's name."""
    rows = []
    prompts = {}
    for number, answers in enumerate(trials):
        given = []
        for prompt_class, prompt, text in answers:
            prompts[prompt] = prompt_class
            refused = text == SORRY
            given.append(response(prompt_class, prompt, response=text, refused=refused))
        rows.append(trial_row(number, responses=given))
    study = put_study(store, *rows)
    told = [
        {"class": c, "split": "search", "prompt_id": p, "row": n, "text": f"How to {p}?"}
        for n, (p, c) in enumerate(prompts.items())
    ]
    put_table(store, "prompts", pl.DataFrame(told, schema=polars_schema(PROMPTS)))
    return study


def small_study(store: Store) -> str:
    """Two trials, three prompts; of six responses four are distinct."""
    return put_responses(
        store,
        [("harmful", "p0", SORRY), ("harmful", "p1", SORRY), ("harmless", "p2", FIRST)],
        [("harmful", "p0", NO), ("harmful", "p1", SORRY), ("harmless", "p2", FIRST)],
    )


ITEMS = sorted(  # what there is to ask about in the small study
    (
        Item(prompt_class, prompt, response_digest(text), f"How to {prompt}?", text)
        for prompt_class, prompt, text in (
            ("harmful", "p0", SORRY),
            ("harmful", "p0", NO),
            ("harmful", "p1", SORRY),
            ("harmless", "p2", FIRST),
        )
    ),
    key=lambda item: item.pair,
)


def save_classifier(folder: Path, family: str = "Bert", seed: int = 0, **options: Any) -> Path:
    """A tiny random sequence classifier, saved with its tokenizer."""
    shape = {
        "vocab_size": 96,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 48,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "initializer_range": 0.5,
        "id2label": {0: "COMPLIED", 1: "REFUSAL"},
        "label2id": {"COMPLIED": 0, "REFUSAL": 1},
    }
    config = getattr(transformers, f"{family}Config")(**(shape | options))
    transformers.set_seed(seed)
    model = getattr(transformers, f"{family}ForSequenceClassification")(config)
    model.save_pretrained(folder)
    toy_tokenizer().save_pretrained(folder)
    return folder


class Server(ThreadingHTTPServer):
    """An OpenAI-compatible endpoint: what it was asked, and what it is to answer.

    Attributes:
        bodies, keys: of every request, in their order.
        faults: (status, headers) of the next answers; then it is well.
        reply: its verdict on a request's text.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.faults: list[tuple[int, dict[str, str]]] = []
        self.guard = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def reply(self, asked: str) -> Any:
        refused = SORRY in asked or NO in asked
        return {"choices": [{"message": {"content": f"VERDICT: {_WORDS[refused]}"}}]}


_WORDS = {True: "REFUSED", False: "COMPLIED"}


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        import json

        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.guard:
            self.server.bodies.append({**body, "path": self.path})
            self.server.keys.append(self.headers.get("Authorization"))
            fault = self.server.faults.pop(0) if self.server.faults else None
        status, headers = fault or (200, {})
        said = self.server.reply(body["messages"][0]["content"]) if status == 200 else "no"
        content = said.encode() if isinstance(said, str) else json.dumps(said).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None: ...


@contextmanager
def serving(server: Server | None = None) -> Iterator[Server]:
    """A server on a free port of loopback."""
    made = server or Server()
    thread = threading.Thread(target=made.serve_forever)
    thread.start()
    try:
        yield made
    finally:
        made.shutdown()
        thread.join()
        made.server_close()
