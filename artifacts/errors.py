"""The errors a user can meet, in one tree.

TribunalError              one line for the user, exit code 2
├── ConfigError            an unknown key, a wrong type, a value out of range
├── PromptError            a prompt set that cannot be read, or that breaks the split rules
├── ModelError             a model that cannot be loaded, rendered, edited or trusted
├── StoreError             a store that cannot be read or written
│   ├── MissingArtifact    no such artifact
│   └── CorruptArtifact    an artifact whose bytes are not those its manifest promises
├── ServerError            the Prefect server cannot be reached
├── JudgeError             a judge of responses cannot be asked
├── WorkerError            workers that judge trials cannot be reached, or die again and again
├── TestSplitSpent         the test split was already opened for another trial
├── ComparisonError        two trials that cannot be compared prompt by prompt
├── PeerError              another tool's file that cannot be read, or says too little to be used
├── ExportError            a folder that cannot be written, or that does not measure as its trial
├── MembersFailed          some benchmarks of a study plan failed (flows/study_plan.py)
└── QueryError             SQL that is refused or fails

Messages carry the offending value in quotes and the way out. They are one line whatever the value,
and never carry a token: `TribunalError` sees to both.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable

LONGEST = 1000  # characters of a message
_TOKEN = re.compile(r"(?:(?<![A-Za-z0-9])|(?<=\\n))hf_[A-Za-z0-9]{16,}|(?<=://)[^/@\s']+@")
_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSWORD|_KEY$|CONNECTION_URL|AUTH_STRING")
_PASSWORD = re.compile(r":([^/@\s]+)(?:@|$)")  # in user:password, and in a URL
_SHORTEST_SECRET = 8  # characters; what is shorter would hide words


class TribunalError(Exception):
    """Base of every error that is shown as one line."""

    exit_code = 2

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class ConfigError(TribunalError):
    """The configuration is not what the schema allows."""

    @classmethod
    def unknown(cls, what: str, name: str, known: Iterable[str]) -> ConfigError:
        """`what` ("config key", "preset") has no member `name`; suggest the nearest of `known`."""
        return cls(f"unknown {what} '{name}'{did_you_mean(name, known)}")


class PromptError(TribunalError):
    """A prompt set cannot be used as the config asks."""


class ModelError(TribunalError):
    """A model cannot be used as the config asks."""


class StoreError(TribunalError):
    """The artifact store cannot be used."""


class MissingArtifact(StoreError):
    """No such artifact."""


class CorruptArtifact(StoreError):
    """Stored bytes differ from the manifest's promise."""


class ServerError(TribunalError):
    """The Prefect server cannot be reached."""


class JudgeError(TribunalError):
    """A judge of responses cannot be asked, or answers in no known form."""


class WorkerError(TribunalError):
    """The workers that judge trials cannot be reached, or die again and again."""


class TestSplitSpent(TribunalError):
    """The test split of this study has been opened for another trial."""

    __test__ = False  # not a pytest class


class ComparisonError(TribunalError):
    """Two trials cannot be compared prompt by prompt."""


class PeerError(TribunalError):
    """Another tool's file cannot be read, or does not say what is needed of it."""


class ExportError(TribunalError):
    """An export cannot be written or uploaded, or does not measure as its trial did."""


class QueryError(TribunalError):
    """User SQL was refused or failed."""


class DamageWarning(UserWarning):
    """Something stored is damaged, and an answer was given without it."""


def one_line(text: str) -> str:
    """A text as it may be shown: secrets hidden, line breaks escaped, a long middle left out."""
    text = _TOKEN.sub("***", text)
    for secret in _secrets():
        text = text.replace(secret, "***")
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def _secrets() -> list[str]:
    """What the environment holds that is not to be shown, and the passwords inside it."""
    values = [value for name, value in os.environ.items() if _SECRET_NAME.search(name)]
    found = [*values, *(password for value in values for password in _PASSWORD.findall(value))]
    return [secret for secret in found if len(secret) >= _SHORTEST_SECRET]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The tail of an error line: the nearest known name, or all of them if none is near."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if near:
        return f"; did you mean '{near[0]}'?"
    return f"; known: {', '.join(names)}" if names else ""
