"""The trial engine: the same prompts, answered under one edit after another.

The answers are those of `decode`, token for token. They cost less, because three things that
trials share are computed once. The layers below the first edited one see the same states in every
trial: a pass begins above them. The first tokens of all prompts (system prompt, template) are the
same: they are one row. And trials answer much alike: a stored response is a draft, which one pass
over all its tokens verifies; only where it ends to match does decoding go on token by token.

A first-token KL depends on no neighbour, draft or chunk: the prompts of a `Sitting` always pass in
the same slices, so equal edits give equal bits, and an edit that does nothing gives exactly those
of the unedited model.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tasks.models.batching import by_length, pad_left, require_tokens
from tasks.models.decoding import (
    Batch,
    NotFinite,
    Request,
    Response,
    decode,
    eos_ids,
    not_finite,
    prompt_mask,
)
from tasks.models.drafts import Drafts
from tasks.models.editing import Edit, Editor, applied
from tasks.models.engine_options import EngineOptions
from tasks.models.grouped_attention import grouped
from tasks.models.partial_pass import PartialPass
from tasks.models.row_cache import RowCache, row_cache

if TYPE_CHECKING:
    from tasks.models.loading import LoadedModel

SLICE_TOKENS = 2048  # of a prompt slice: part of what a KL's last bits depend on, so never probed
SHORTEST_FRONT = 4  # tokens; a shorter front costs a pass more than it spares
MEMORY_SHARE = 0.25  # of what is free, for recorded states
DRAFT_ROUNDS = 3
DRAFTS_KEPT = 2  # recorded drafts per prompt, on average
FEW = 64  # rows
PLAIN_ROWS = 64  # of a batch without the engine: fixed, since a KL depends on it


@dataclass
class _Slice:
    """Prompts of similar length in one rectangle, without the shared front."""

    first: int
    ids: Tensor
    mask: Tensor
    positions: Tensor
    states: dict[int, Tensor] = field(default_factory=dict)


@dataclass
class _Group:
    """Prompts that are prefilled together, shortest first: what all trials share of them."""

    prompts: list[int]
    place: dict[int, int]
    width: int
    slices: list[_Slice]
    front_states: dict[int, Tensor] = field(default_factory=dict)
    cache: Any = None  # keys and values of the unedited model
    logits: Any = None  # of the unedited model, [prompts, vocabulary]


class Engine:
    """Answers a fixed list of prompts under any edit.

    Args:
        loaded: the model.
        prompts: token lists, rendered and encoded.
        max_new_tokens: longest response, an end-of-sequence token included.

    Raises:
        ModelError: an empty prompt.
        ValueError: `max_new_tokens` below 1.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        options: EngineOptions | None = None,
    ) -> None:
        self.options = options or EngineOptions()
        require_tokens(prompts, self.options.rows)
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
        self.loaded, self.limit = loaded, max_new_tokens
        self.prompts = [list(prompt) for prompt in prompts]
        self.verify_tokens = self.options.verify_tokens or SLICE_TOKENS
        self.eos = frozenset(eos_ids(loaded))
        self.depth = len(loaded.anatomy.layers)
        self.partial = PartialPass(loaded.anatomy.layers)
        self.exact = self._cacheable()
        self.front = self._common_front() if self.exact else 0
        self.levels = self._levels() if self.exact else []
        self._groups: dict[tuple[int, ...], _Group] = {}
        self._draft_states: dict[tuple[int, tuple[int, ...]], dict[int, Tensor]] = {}

    def forget(self) -> None:
        """Let go of everything that was computed, of the model too."""
        self._groups.clear()
        self._draft_states.clear()

    def sit(self, edit: Edit | None = None) -> Sitting:
        """Begin to answer under an edit, or (None) as the unedited model."""
        return Sitting(self, edit)

    def level_of(self, edit: Edit | None) -> int:
        """The highest level with recorded states that is not above the edit's first layer."""
        if edit is None:
            return 0
        lowest = min((layer for layer, _ in edit.modules), default=self.depth)
        return max((level for level in self.levels if level <= lowest), default=0)

    def group(self, prompts: Sequence[int]) -> _Group:
        """The group of these prompts, run once through the unedited model."""
        key = tuple(prompts)
        if key not in self._groups:
            self._groups[key] = self._new_group(prompts)
        return self._groups[key]

    def _cacheable(self) -> bool:
        """Whether the model's state is plain attention that sees everything before it."""
        config = self.loaded.model.config
        longest = max(map(len, self.prompts), default=0) + 2 * self.limit
        window = getattr(config.get_text_config(), "sliding_window", None)
        plain = isinstance(row_cache(config, 1, 1, 1), RowCache)
        return plain and (window is None or longest <= window)

    def _common_front(self) -> int:
        """How many tokens all prompts begin with, at least one token of each left."""
        if not self.options.share_front or len(self.prompts) < 2:
            return 0
        low, high = min(self.prompts), max(self.prompts)  # their front is everybody's
        same = (a == b for a, b in zip(low, high, strict=False))
        shared = sum(1 for _ in takewhile(bool, same))
        shared = min(shared, min(map(len, self.prompts)) - 1)
        return shared if shared >= SHORTEST_FRONT else 0

    def _levels(self) -> list[int]:
        """Levels whose states are kept: all of them, or as many as fit into memory."""
        if not self.options.share_layers:
            return []
        tokens = sum(map(len, self.prompts)) + DRAFTS_KEPT * self.limit * len(self.prompts)
        model = self.loaded.model
        of_one = tokens * self.loaded.anatomy.hidden_size * model.dtype.itemsize
        fitting = int(MEMORY_SHARE * free_memory(self.loaded.device) // max(of_one, 1))
        if fitting < 1:
            return []
        stride = -(-self.depth // fitting)
        return [level for level in range(1, self.depth + 1) if (self.depth - level) % stride == 0]

    def _new_group(self, prompts: Sequence[int]) -> _Group:
        order = [prompts[i] for i in by_length([self.prompts[p] for p in prompts], len(prompts))[0]]
        rest = [self.prompts[p][self.front :] for p in order]
        width = max(map(len, rest))
        step = max(SLICE_TOKENS // width, 1)
        slices = []
        for first in range(0, len(order), step):
            ids, mask, positions = pad_left(rest[first : first + step], self.loaded.device)
            mask = torch.cat([mask.new_ones(len(ids), self.front), mask], 1)
            slices.append(_Slice(first, ids, mask, positions + self.front))
        group = _Group(list(order), {p: i for i, p in enumerate(order)}, self.front + width, slices)
        with torch.inference_mode():
            group.cache, group.logits = self._prefill(group, 0, record=True)
        return group

    def _prefill(self, group: _Group, level: int, *, record: bool) -> tuple[RowCache, Tensor]:
        """Keys and values from `level` on, and the logits [prompts, vocabulary] that follow."""
        config, rows = self.loaded.model.config, len(group.prompts)
        cache = row_cache(config, rows, group.width, 0)
        if self.front:
            cache.share_front(self._front_cache(group, level, record=record))
        parts = []
        for part in group.slices:
            cache.prefill_from(part.first)
            states = self._passing(level, part.states, record=record)
            with states:
                parts.append(self.forward(part.ids, part.mask, part.positions, cache, 1)[:, -1])
        cache.end_prefill()
        return cache, torch.cat(parts)

    def _front_cache(self, group: _Group, level: int, *, record: bool) -> RowCache:
        ids = torch.tensor([list(self.prompts[group.prompts[0]][: self.front])])
        ids = ids.to(self.loaded.device)
        cache: RowCache = row_cache(self.loaded.model.config, 1, self.front, 0)
        positions = torch.arange(self.front, device=ids.device)[None]
        with self._passing(level, group.front_states, record=record):
            self.forward(ids, torch.ones_like(ids), positions, cache, 1)
        return cache

    @contextmanager
    def _passing(self, level: int, states: dict[int, Tensor], *, record: bool) -> Iterator[None]:
        """Forward passes that begin at `level`, or whole ones whose states are kept."""
        if record:
            with self.partial.recorded(self.levels) as found:
                yield
            states |= found
        else:
            with self.partial.beginning_at(level, states.get(level)):
                yield

    def forward(
        self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any, keep: int
    ) -> Tensor:
        """Logits [rows, the last `keep` tokens or (0) all, vocabulary]."""
        with grouped(self.loaded.model):
            output = self.loaded.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=cache is not None,
                logits_to_keep=keep,
            )
        logits: Tensor = output.logits
        return logits

    def record_drafts(self, drafts: Sequence[tuple[int, tuple[int, ...]]]) -> None:
        """Run drafts that are new through the unedited model; no edit may be applied."""
        if len(self._draft_states) > DRAFTS_KEPT * len(self.prompts):
            wanted = set(drafts)
            self._draft_states = {d: s for d, s in self._draft_states.items() if d in wanted}
        missing = [draft for draft in drafts if draft not in self._draft_states]
        longest = max(map(len, self.prompts)) + self.limit
        step = max(self.verify_tokens // longest, 1)
        with torch.inference_mode():
            for first in range(0, len(missing), step):
                self._record_drafts(missing[first : first + step])

    def draft_states(self, prompt: int, draft: tuple[int, ...], level: int) -> Tensor:
        """Recorded states [fed tokens, d] of a draft at `level`, under the unedited model."""
        return self._draft_states[prompt, draft][level]

    def _record_drafts(self, drafts: Sequence[tuple[int, tuple[int, ...]]]) -> None:
        whole = [[*self.prompts[p], *self.fed(draft)] for p, draft in drafts]
        ids, mask, positions = pad_left(whole, self.loaded.device)
        with self.partial.recorded(self.levels) as states:
            self.forward(ids, mask, positions, None, 1)
        for row, (p, draft) in enumerate(drafts):
            count = len(self.fed(draft))
            self._draft_states[p, draft] = {
                level: found[row, found.shape[1] - count :].clone()
                for level, found in states.items()
            }

    def fed(self, draft: Sequence[int]) -> Sequence[int]:
        """What of a draft goes through the model: all but an end-of-sequence token."""
        return draft[:-1] if draft[-1] in self.eos else draft


class Sitting:
    """One edit's answers, as they become known.

    Ask for the `first_logits` of a class of prompts, `verify` drafts of those, hand what is left to
    a `Pool`; `found` then holds the responses by prompt.
    """

    def __init__(self, engine: Engine, edit: Edit | None) -> None:
        self.engine, self.edit = engine, edit
        self.level = engine.level_of(edit)
        self.found: dict[int, Response] = {}
        self._begun: dict[int, list[int]] = {}
        self._held: dict[int, tuple[_Group, RowCache]] = {}

    def first_logits(self, prompts: Sequence[int]) -> Tensor:
        """Raw logits of each response's first token, float32 [prompts, vocabulary] on the CPU.

        Raises:
            ModelError: they are not finite.
        """
        if not self.engine.exact:
            return self._decode_whole(prompts)
        group = self.engine.group(prompts)
        with torch.inference_mode(), self._editing():
            if self.edit is None:
                cache, logits = group.cache, group.logits
            else:
                cache, logits = self.engine._prefill(group, self.level, record=False)
        best, tokens = logits.max(-1)
        for prompt, value, token in zip(group.prompts, best.tolist(), tokens.tolist(), strict=True):
            if not math.isfinite(value):
                raise not_finite(prompt, 0)
            self._held[prompt] = group, cache
            self._begin(prompt, [token])
        chosen: Tensor = logits[[group.place[prompt] for prompt in prompts]]
        return chosen.float().cpu()

    def guesses(self, prompts: Sequence[int], drafts: Drafts) -> dict[int, tuple[int, ...]]:
        """The draft that each prompt's response may turn out to be."""
        if not (self.engine.exact and self.engine.options.drafts and drafts.pay):
            return {}
        waiting = (prompt for prompt in prompts if prompt not in self.found)
        found = {prompt: drafts.match(prompt, self._begun[prompt]) for prompt in waiting}
        cut = {prompt: self._cut(draft) for prompt, draft in found.items() if draft is not None}
        return {p: draft for p, draft in cut.items() if len(draft) > len(self._begun[p])}

    def _cut(self, draft: tuple[int, ...]) -> tuple[int, ...]:
        """A draft as far as a response can go: to its first end and within the limit."""
        end = next((i + 1 for i, token in enumerate(draft) if token in self.engine.eos), len(draft))
        return draft[: min(end, self.engine.limit)]

    def verify(self, prompts: Sequence[int], drafts: Drafts) -> None:
        """Go on with each response as far as drafts tell it right."""
        for _ in range(DRAFT_ROUNDS):
            chosen = sorted(self.guesses(prompts, drafts).items(), key=lambda each: len(each[1]))
            if not chosen:
                return
            if self.level:
                self.engine.record_drafts(chosen)
            with torch.inference_mode(), self._editing():
                for chunk in self._chunks(chosen):
                    self._verify_chunk(chunk)

    def waiting(self, prompts: Sequence[int]) -> list[int]:
        """Prompts whose response is not known to its end."""
        return [prompt for prompt in prompts if prompt not in self.found]

    def release(self) -> None:
        """Let go of keys and values; what waits has to be in a pool by now."""
        self._held.clear()

    def request(self, prompt: int, edit: int, *, whole: bool) -> Request:
        """The response as a request: whole, or what is left of it."""
        begun = [] if whole else self._begun[prompt]
        tokens = [*self.engine.prompts[prompt], *begun]
        return Request(edit, tokens, self.engine.limit - len(begun))

    def finish(self, prompt: int, response: Response) -> None:
        """Take the rest of a response."""
        self.found[prompt] = Response([*self._begun[prompt], *response.tokens], response.ended)

    def fresh(self, prompts: Sequence[int]) -> list[int]:
        """Prompts of whose response only the first token is known, and all keys and values."""
        return [p for p in prompts if p in self._held and len(self._begun[p]) == 1]

    def prompt_cache(self, prompts: Sequence[int]) -> RowCache:
        """A copy of the keys and values of prompts of one group, all layers."""
        group, cache = self._held[prompts[0]]
        rows = torch.tensor([group.place[prompt] for prompt in prompts])
        copy: RowCache = row_cache(self.engine.loaded.model.config, len(rows), group.width, 0)
        for source, layers in ((group.cache, slice(self.level)), (cache, slice(self.level, None))):
            copy.copy_rows(source, rows, first=0, front=self.engine.front, layers=layers)
        copy.end_prefill()
        return copy

    def first_tokens(self, prompts: Sequence[int]) -> list[int]:
        """The first token of each response."""
        return [self._begun[prompt][0] for prompt in prompts]

    def _editing(self) -> Any:
        return applied(self.engine.loaded.anatomy, [self.edit]) if self.edit else nullcontext()

    def _begin(self, prompt: int, tokens: list[int]) -> None:
        """Note what is known of a response; it may be all of it."""
        self._begun[prompt] = tokens
        if tokens[-1] in self.engine.eos:
            self.found[prompt] = Response(tokens[:-1], True)
        elif len(tokens) == self.engine.limit:
            self.found[prompt] = Response(tokens, False)

    def _chunks(
        self, chosen: Sequence[tuple[int, tuple[int, ...]]]
    ) -> Iterator[list[tuple[int, tuple[int, ...]]]]:
        """Drafts of one group, in passes of `verify_tokens` tokens; sorted by length before."""
        start = 0
        while start < len(chosen):
            end = start
            group = self._held[chosen[start][0]][0]
            while (
                end < len(chosen)
                and self._held[chosen[end][0]][0] is group
                and (end - start + 1) * len(chosen[end][1]) <= self.engine.verify_tokens
            ):
                end += 1
            end = max(end, start + 1)
            yield list(chosen[start:end])
            start = end

    def _verify_chunk(self, chosen: list[tuple[int, tuple[int, ...]]]) -> None:
        best, tokens = self._draft_logits(chosen)
        finite = torch.isfinite(best)
        for row, (prompt, draft) in enumerate(chosen):
            fed = len(self.engine.fed(draft))
            if not bool(finite[row, :fed].all()):
                raise not_finite(prompt, len(self._begun[prompt]))
            after = tokens[row, :fed].tolist()  # after[i] follows draft[i]
            right = next((i for i in range(fed) if draft[i + 1 : i + 2] != (after[i],)), fed)
            known = [*draft[: right + 1], *after[right : right + 1]]
            self._begin(prompt, known[: self.engine.limit])

    def _draft_logits(self, chosen: list[tuple[int, tuple[int, ...]]]) -> tuple[Tensor, Tensor]:
        """The largest logit [rows, fed tokens] after each draft token, and whose it is."""
        engine, (group, cache) = self.engine, self._held[chosen[0][0]]
        fed = [engine.fed(draft) for _, draft in chosen]
        width, rows = max(map(len, fed)), torch.tensor([group.place[p] for p, _ in chosen])
        device = engine.loaded.device
        ids = torch.tensor([[*draft, *[0] * (width - len(draft))] for draft in fed]).to(device)
        lengths = torch.tensor([len(engine.prompts[p]) for p, _ in chosen])[:, None].to(device)
        positions = lengths + torch.arange(width, device=device)
        places = torch.arange(group.width + width, device=device)
        mask = prompt_mask(places, lengths, group.width, engine.front)
        working = row_cache(engine.loaded.model.config, len(chosen), group.width, width)
        edited = slice(self.level, None)
        working.copy_rows(cache, rows, first=0, front=engine.front, layers=edited)
        working.end_prefill()
        states = self._draft_states(chosen, fed, width)
        with engine.partial.beginning_at(self.level, states):
            logits = engine.forward(ids, mask, positions, working, 0)
        best, tokens = logits.max(-1)
        return best.cpu(), tokens.cpu()

    def _draft_states(
        self, chosen: list[tuple[int, tuple[int, ...]]], fed: Sequence[Sequence[int]], width: int
    ) -> Tensor | None:
        if self.level == 0:
            return None
        found = [self.engine.draft_states(*each, self.level) for each in chosen]
        states = found[0].new_zeros(len(found), width, found[0].shape[-1])  # one level, one device
        for row, (own, draft) in enumerate(zip(found, fed, strict=True)):
            states[row, : len(draft)] = own
        return states

    def _decode_whole(self, prompts: Sequence[int]) -> Tensor:
        """Where a model's state is more than attention: the plain way, in one go."""
        engine = self.engine
        (decoded,) = decode(
            engine.loaded,
            [engine.prompts[prompt] for prompt in prompts],
            [self.edit] if self.edit else (),
            max_new_tokens=engine.limit,
            rows=PLAIN_ROWS,
        )
        for prompt, tokens, ended in zip(prompts, decoded.tokens, decoded.ended, strict=True):
            self.found[prompt] = Response(tokens, ended)
        return decoded.first_logits


@dataclass(frozen=True)
class _Part:
    """Prompts of one sitting that wait; `cache` if their responses go on from the first token."""

    sitting: Sitting
    prompts: list[int]
    cache: RowCache | None


class Pool:
    """What several sittings still wait for, decoded token by token, side by side."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._parts: list[_Part] = []

    def __len__(self) -> int:
        return sum(len(part.prompts) for part in self._parts)

    def add(self, sitting: Sitting, prompts: Sequence[int]) -> None:
        """Wait for the responses to prompts of one group; takes what it needs of the sitting."""
        waiting = sitting.waiting(prompts)
        fresh = sitting.fresh(waiting)
        late = [prompt for prompt in waiting if prompt not in set(fresh)]
        size = self.engine.options.rows
        for part in (fresh[at : at + size] for at in range(0, len(fresh), size)):
            self._parts.append(_Part(sitting, part, sitting.prompt_cache(part)))
        for part in (late[at : at + size] for at in range(0, len(late), size)):
            self._parts.append(_Part(sitting, part, None))

    def forget(self, sitting: Sitting) -> None:
        """Wait no longer for anything of a sitting."""
        self._parts = [part for part in self._parts if part.sitting is not sitting]

    def run(self, on_batch: Callable[[], object] = lambda: None) -> None:
        """Decode everything, and tell the sittings; `on_batch` is called after every batch."""
        few = len(self) <= FEW  # running their prompts again costs less than a loop of their own
        fresh = [part for part in self._parts if part.cache is not None and not few]
        late = [part for part in self._parts if part.cache is None or few]
        self._parts = []
        with torch.inference_mode():
            for parts in _up_to(fresh, self.engine.options.rows):
                self._resume(parts)
                on_batch()
            for parts in _up_to(late, self.engine.options.rows):
                self._restart(parts)
                on_batch()

    def _resume(self, parts: Sequence[_Part]) -> None:
        """Responses that go on from the first token: no prompt is run again."""
        engine, owners = self.engine, [(part, p) for part in parts for p in part.prompts]
        requests = self._requests(parts, whole=True)
        width = max(part.cache.layers[0].prompt_length for part in parts if part.cache)
        merged = row_cache(engine.loaded.model.config, len(owners), width, engine.limit)
        first = 0
        for part in parts:
            rows = torch.arange(len(part.prompts))
            assert part.cache is not None
            merged.copy_rows(part.cache, rows, first=first, front=engine.front, layers=slice(None))
            first += len(rows)
        merged.end_prefill()
        tokens = [t for part in parts for t in part.sitting.first_tokens(part.prompts)]
        with self._editing(parts) as editor, _naming(owners):
            batch = Batch(engine.loaded, editor, requests, width=width, front=engine.front)
            found = batch.resume(merged, torch.tensor(tokens, device=engine.loaded.device))
        for (part, prompt), response in zip(owners, found, strict=True):
            part.sitting.found[prompt] = response

    def _restart(self, parts: Sequence[_Part]) -> None:
        """Responses of which drafts told a part: prompt and part are run again."""
        owners = [(part, p) for part in parts for p in part.prompts]
        requests = self._requests(parts, whole=False)
        with self._editing(parts) as editor, _naming(owners):
            batch = Batch(self.engine.loaded, editor, requests)
            found = batch.run(batch.prefill())
        for (part, prompt), response in zip(owners, found, strict=True):
            part.sitting.finish(prompt, response)

    def _requests(self, parts: Sequence[_Part], *, whole: bool) -> list[Request]:
        numbers = {sitting: number for number, sitting in enumerate(_sittings(parts))}
        return [
            part.sitting.request(prompt, numbers[part.sitting], whole=whole)
            for part in parts
            for prompt in part.prompts
        ]

    @contextmanager
    def _editing(self, parts: Sequence[_Part]) -> Iterator[Editor | None]:
        """The edits of these parts applied; None where rows need not say which they carry."""
        edits = [sitting.edit or Edit({}) for sitting in _sittings(parts)]
        with applied(self.engine.loaded.anatomy, edits) as editor:
            yield editor if len(edits) > 1 else None


def _sittings(parts: Sequence[_Part]) -> list[Sitting]:
    """Whose parts these are, each once, in order."""
    return list(dict.fromkeys(part.sitting for part in parts))


def _up_to(parts: Sequence[_Part], rows: int) -> Iterator[list[_Part]]:
    """Neighbouring parts of at most `rows` rows."""
    chosen: list[_Part] = []
    for part in parts:
        if chosen and sum(len(each.prompts) for each in chosen) + len(part.prompts) > rows:
            yield chosen
            chosen = []
        chosen.append(part)
    if chosen:
        yield chosen


@contextmanager
def _naming(owners: Sequence[tuple[_Part, int]]) -> Iterator[None]:
    try:
        yield
    except NotFinite as error:
        raise not_finite(owners[error.row][1], error.step) from error


def free_memory(device: torch.device) -> int:
    """Bytes that a device could still give."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    with suppress(OSError):  # no Linux: what is free has to do
        told = Path("/proc/meminfo").read_text().partition("MemAvailable:")[2].split()
        if told:
            return 1024 * int(told[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
