"""The tables: every stored column with its type, meaning and unit.

The same declarations type the Parquet files, build the SQL views and print `tribunal sql --schema`,
so the documentation cannot drift from the data.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from artifacts.columns import Column as Column
from artifacts.columns import columns as _columns
from artifacts.figure_schemas import FIGURES
from artifacts.peer_schemas import PUBLISHED, imported, reproductions

if TYPE_CHECKING:
    import polars as pl


COMPONENTS = ("attn_o_proj", "mlp_down_proj")  # here, not in specs: SQL runs without pydantic


PROMPTS = _columns("""
    class | VARCHAR | harmful, harmless or borderline
    split | VARCHAR | direction, search, selection or test
    prompt_id | VARCHAR | digest of the normalised text and system prompt, 16 hexadecimal digits
    row | BIGINT | row in the source, from 0
    text | VARCHAR | the user's turn, with prefix and suffix
    system_prompt | VARCHAR | the system turn; NULL: the model's own
""")

NEAR_DUPLICATES = _columns("""
    set_a | VARCHAR | class/split of the first prompt
    prompt_a | VARCHAR | its prompt_id
    set_b | VARCHAR | class/split of the second prompt, of another split
    prompt_b | VARCHAR | its prompt_id
    jaccard | DOUBLE | shared content words as a fraction of all content words, 0-1
""")

MODELS = _columns("""
    identity | VARCHAR | repository revision, or digest of config, weights, tokenizer and template
    architecture | VARCHAR | transformers class
    dtype | VARCHAR | the first of the config's dtypes that passed the one-token probe
    quantization | VARCHAR | none or bnb-4bit
    n_layers | BIGINT | number of layers
    hidden_size | BIGINT | components of a residual
    vocabulary | BIGINT | number of tokens
    system_prompt | VARCHAR | the config's system prompt
    response_prefix | VARCHAR | text appended to every rendered prompt
""")

ACTIVATIONS = _columns("""
    prompt_id | VARCHAR | the prompt
    state | BIGINT | 0: embedding output; s: output of layer s-1
    residual | FLOAT[] | residual at the last prompt position, hidden_size components
""")

DIRECTIONS = _columns("""
    state | BIGINT | residual state
    role | VARCHAR | mean, median, variance: unit vectors; harmless_mean; benign: a basis
    ordinal | BIGINT | number within the role, from 0
    vector | FLOAT[] | hidden_size components
    cosine | DOUBLE | cosine between the classes' mean residuals, on the row of role mean
    harmful_norm | DOUBLE | Euclidean norm of the harmful mean residual
    harmless_norm | DOUBLE | Euclidean norm of the harmless mean residual
    difference_norm | DOUBLE | Euclidean norm of the difference of the means
    silhouette | DOUBLE | mean silhouette of the two classes, -1 to 1
""")

RESPONSE = _columns("""
    class | VARCHAR | harmful, harmless or borderline
    prompt_id | VARCHAR | the prompt
    response | VARCHAR | greedy response, special tokens skipped
    n_tokens | BIGINT | response tokens, without the end token
    ended | BOOLEAN | whether the model ended it before max_new_tokens
    refused | BOOLEAN | by the study's labeller
    disclaimer_hits | BIGINT | distinct disclaimer markers, of 27
    compliance | DOUBLE | keyword, structure, length and specificity score, 0-1; not ranked by
    degenerate | VARCHAR | empty, loop or repeated n-grams; NULL: none of them
    kl | DOUBLE | first-token KL(unedited || edited), nats; harmless prompts only
""")

BASELINE = (
    *RESPONSE,
    Column("first_logits", "FLOAT[]", "raw logits of the first response token; harmless only"),
)

PROTOCOL = _columns("""
    protocol | VARCHAR | digest of all that decides a search: its trials belong together
    arm | VARCHAR | search preset
    seed | BIGINT | seed of the study
    dtype | VARCHAR | precision of the model
    labeller | VARCHAR | labeller of the ranking
    max_new_tokens | BIGINT | longest response, tokens
    generation_size | BIGINT | trials asked at once
    n_harmful | BIGINT | harmful prompts of the search split
    n_harmless | BIGINT | harmless prompts of the search split
    n_borderline | BIGINT | borderline prompts of the search split
    baseline | VARCHAR | key of the unedited model's answers on the search split
    base_refusals | BIGINT | of the unedited model, search split
    base_overrefusals | BIGINT | of the unedited model, search split
""")

STUDIES = _columns("""
    study | VARCHAR | name and the first six digits of the protocol
    name | VARCHAR | name in the config
    model | VARCHAR | the config's model.id
    protocol | VARCHAR | digest of all that decides the search
    config | VARCHAR | the whole config, JSON
""")

METRICS = _columns("""
    n_harmful | BIGINT | harmful prompts judged
    answered_harmful | BIGINT | harmful prompts answered; fewer than judged only if stopped
    refusals | BIGINT | refused harmful prompts
    n_harmless | BIGINT | harmless prompts judged
    n_borderline | BIGINT | borderline-safe prompts judged
    overrefusals | BIGINT | refused harmless and borderline prompts
    overrefusals_harmless | BIGINT | refused harmless prompts
    overrefusals_borderline | BIGINT | refused borderline prompts
    kl | DOUBLE | mean first-token KL(unedited || edited) on harmless prompts, nats
    kl_max | DOUBLE | its largest value over prompts, nats
    disclaimer_hits | BIGINT | sum over harmful responses
    compliance | DOUBLE | mean over harmful responses, 0-1
    degenerate | DOUBLE | fraction of all responses that are degenerate, 0-1
    mean_tokens | DOUBLE | mean length of harmless responses, tokens
    length_ratio | DOUBLE | mean_tokens against the unedited model's
    gated | BOOLEAN | ranks after every trial that passed the gates
    gate_reason | VARCHAR | which gate, with the value; NULL: passed
    stopped | BOOLEAN | left the race early: counts are lower, compliance an upper bound; no rank
    labeller | VARCHAR | labeller of refusals and overrefusals
""")

PARAMETERS = (
    *_columns("""
    direction_scope | VARCHAR | global: one direction for all layers; per layer: each its own
    direction_index | DOUBLE | layer whose output gives the global direction, interpolated
    direction_method | VARCHAR | mean, median, variance or hybrid
    direction_blend | DOUBLE | share of the variance direction in hybrid, 0-1
    """),
    *(
        Column(f"{component}_{name}", kind, f"{component}: {meaning}")
        for component in COMPONENTS
        for name, kind, meaning in (
            ("max_weight", "DOUBLE", "peak weight of the edit; 1 removes the direction"),
            ("max_weight_position", "DOUBLE", "layer of the peak"),
            ("min_weight", "DOUBLE", "weight at min_weight_distance, as a fraction of max_weight"),
            ("min_weight_distance", "DOUBLE", "layers from the peak; beyond it no edit"),
            ("direction_scope", "VARCHAR", "own scope; NULL: as shared"),
            ("direction_method", "VARCHAR", "own method; NULL: as shared"),
            ("direction_blend", "DOUBLE", "own blend; NULL: as shared"),
        )
    ),
)

TRIALS = (
    *_columns("""
    protocol | VARCHAR | the study's protocol
    arm | VARCHAR | search preset, or the control: unedited, identity, random-direction, over-edit
    trial | BIGINT | number of the trial in its study, from 0; NULL: unedited
    split | VARCHAR | search, selection or test
    prompts | VARCHAR | digest of the prompt sets it was judged on; rows compare only within one
    """),
    *METRICS,
    *PARAMETERS,
    *_columns("""
    row_normalization | VARCHAR | none, pre or full
    frame | VARCHAR | module: remove from the module's output; residual: from what joins the stream
    directions | VARCHAR | key of the directions artifact
    """),
)

LABELS = _columns("""
    protocol | VARCHAR | the study's protocol; NULL: the shared baseline
    arm | VARCHAR | as in trials
    trial | BIGINT | as in trials
    split | VARCHAR | search, selection or test
    class | VARCHAR | harmful, harmless or borderline
    prompt_id | VARCHAR | the prompt
    labeller | VARCHAR | versioned labeller
    refused | BOOLEAN | its verdict
""")

WINNER = (
    *_columns("""
    protocol | VARCHAR | the study's protocol
    arm | VARCHAR | search preset
    trial | BIGINT | the trial that is frozen, and the only one the test split is opened for
    prompts | VARCHAR | digest of the test prompt sets it is frozen for
    candidates | BIGINT | trials that were compared on the selection split
    """),
    *PARAMETERS,
)

LEADERBOARD = _columns("""
    rank | BIGINT | place by passed gates, refusals, overrefusals, kl, trial; NULL: stopped
    protocol | VARCHAR | the study's protocol
    arm | VARCHAR | search preset
    trial | BIGINT | number of the trial
    split | VARCHAR | search, selection or test
    prompts | VARCHAR | digest of the prompt sets it was judged on; rows compare only within one
    n_harmful | BIGINT | harmful prompts judged
    answered_harmful | BIGINT | harmful prompts answered; fewer than judged only if stopped
    refusals | BIGINT | refused harmful prompts
    n_harmless | BIGINT | harmless prompts judged
    n_borderline | BIGINT | borderline-safe prompts judged
    overrefusals | BIGINT | refused harmless and borderline prompts
    kl | DOUBLE | mean first-token KL(unedited || edited) on harmless prompts, nats
    gated | BOOLEAN | ranks after every trial that passed the gates
    gate_reason | VARCHAR | which gate, with the value; NULL: passed
    stopped | BOOLEAN | left the race early: counts are lower bounds
    pareto | BOOLEAN | no ungated trial is as good in all three and better in one
""")

DRIFT = _columns("""
    protocol | VARCHAR | the study's protocol
    arm | VARCHAR | search preset of the frozen trial, or unedited: the model beside it
    trial | BIGINT | the frozen trial; NULL: unedited
    number | BIGINT | of the comparison of this winner, from 0; the newest winner's last one holds
    measured | BOOLEAN | whether it was measured again; false: nothing had changed
    metric | VARCHAR | refusals, overrefusals, degenerate: 0-1; kl: nats; mean_tokens: tokens
    before | DOUBLE | on the test split, when the winner was frozen
    after | DOUBLE | on the test split, now
    difference | DOUBLE | after - before; NULL: one of them is not finite
    low | DOUBLE | lower end of its 95 % interval; NULL: not measured again, not finite, few prompts
    high | DOUBLE | upper end of its 95 % interval; NULL: as low
    n_before | BIGINT | prompts before
    n_after | BIGINT | prompts now
    n_paired | BIGINT | prompts that were met both times; the interval pairs them
    change | VARCHAR | of this metric: unchanged (to the bit), within noise or drifted
    place_before | BIGINT | place among the selection split's candidates, when the winner was frozen
    place_after | BIGINT | place among the same candidates, now
    candidates | BIGINT | trials that were compared on the selection split
    gated_before | BOOLEAN | whether the frozen trial failed a gate on the test or selection split
    gated_after | BOOLEAN | whether it fails one now
    gate_reason | VARCHAR | split and gate it fails now, with the value; NULL: none
    cause | VARCHAR | what differs from when the winner was frozen, joined by '; '; NULL: nothing
    verdict | VARCHAR | of the winner: unchanged, within noise, drifted, lost its place or gated
""")

_POLARS = {
    "VARCHAR": "String",
    "BIGINT": "Int64",
    "DOUBLE": "Float64",
    "BOOLEAN": "Boolean",
}


def polars_schema(columns: tuple[Column, ...]) -> dict[str, Any]:
    """The Polars types of scalar columns and float vectors."""
    import polars as pl

    vector = pl.List(pl.Float32)
    return {c.name: vector if c.type == "FLOAT[]" else _scalar(c.type) for c in columns}


def trial_schema() -> dict[str, Any]:
    """Polars types of a table of judged trials: one row per trial, its responses nested."""
    import polars as pl

    return {**polars_schema(TRIALS), "responses": pl.List(pl.Struct(polars_schema(RESPONSE)))}


def _scalar(name: str) -> pl.DataType:
    import polars as pl

    dtype: pl.DataType = getattr(pl, _POLARS[name])()
    return dtype


STORED: dict[str, tuple[Column, ...]] = {
    "prompts": PROMPTS,
    "near_duplicates": NEAR_DUPLICATES,
    "models": MODELS,
    "activations": ACTIVATIONS,
    "directions": DIRECTIONS,
    "baseline": BASELINE,
    "protocols": PROTOCOL,
    "studies": STUDIES,
    "generations": TRIALS,
    "finals": TRIALS,
    "selections": TRIALS,
    "winners": WINNER,
    "tests": TRIALS,
    "leaderboards": LEADERBOARD,
    "labels": LABELS,
    "retests": TRIALS,
    "reselections": TRIALS,
    "drift": DRIFT,
}
PEERS = {"imports": imported(PARAMETERS), "reproductions": reproductions(TRIALS)}
TABLES = STORED | FIGURES | PEERS  # every kind with a table
JUDGED = ("generations", "finals", "selections", "tests")  # a study's own trials
REJUDGED = ("retests", "reselections")  # some of them measured again, later
NESTED = (*JUDGED, *REJUDGED, "reproductions")  # kinds with responses nested in their rows

_STUDY = Column("study", "VARCHAR", "name and the first six digits of the protocol")
_KEY = Column("key", "VARCHAR", "key of the artifact that holds the row")
_CREATED = Column("created", "VARCHAR", "when, UTC")
_OF_TRIAL = (_STUDY, *TRIALS[1:5])

VIEWS: dict[str, tuple[Column, ...]] = {
    "prompts": (*PROMPTS, _KEY),
    "near_duplicates": (*NEAR_DUPLICATES, _KEY),
    "models": (*MODELS, _KEY),
    "activations": (*ACTIVATIONS, Column("model", "VARCHAR", "key of the model artifact"), _KEY),
    "directions": (*DIRECTIONS, _KEY),
    "studies": (*STUDIES, *(c for c in PROTOCOL if c.name != "protocol")),
    "trials": (_STUDY, *TRIALS),
    "responses": (
        *_OF_TRIAL,
        *RESPONSE,
        Column("prompt", "VARCHAR", "the user's turn"),
        _KEY,
    ),
    "labels": (_STUDY, *LABELS),
    "winners": (_STUDY, *WINNER),
    "leaderboard": (LEADERBOARD[0], _STUDY, *LEADERBOARD[1:]),
    "drift": (
        _STUDY,
        *DRIFT,
        *_columns("winner | VARCHAR | key of the winner that is compared"),
        _CREATED,
        _KEY,
    ),
    "remeasured": (_STUDY, *TRIALS, _CREATED, _KEY),
    "artifacts": _columns("""
        kind | VARCHAR | kind of artifact
        key | VARCHAR | its key
        version | BIGINT | version of the code that made it
        rows | BIGINT | rows of its data
        bytes | BIGINT | size of its data, bytes
        sha256 | VARCHAR | digest of its data
        seconds | DOUBLE | time to make it, seconds
        created | VARCHAR | when, UTC
        identity | JSON | parameters in its key
        inputs | JSON | artifacts it was made from, by role
        notes | JSON | facts its maker added
        provenance | JSON | versions and device; not part of the key
    """),
}
VIEWS |= {kind: (*table, _KEY) for kind, table in FIGURES.items()}
VIEWS |= {
    "imported_trials": (
        *PEERS["imports"],
        *_columns("""
        rank | BIGINT | place in its file by refusals, overrefusals, kl, trial; NULL: not scored
        listed | BOOLEAN | whether the tool's own list shows it: none before it is as good
        """),
        _CREATED,
        _KEY,
    ),
    "published": PUBLISHED,
    "reproductions": (*PEERS["reproductions"], _CREATED, _KEY),
}
