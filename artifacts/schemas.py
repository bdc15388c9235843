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

CATEGORIES = _columns("""
    class | VARCHAR | harmful, harmless or borderline
    split | VARCHAR | direction, search, selection or test
    prompt_id | VARCHAR | the prompt
    source_column | VARCHAR | column of the prompt's source that holds the category
    category | VARCHAR | what stands there
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
    refused | BOOLEAN | its verdict; NULL: it could not tell
""")

JUDGEMENTS = _columns("""
    prompt_id | VARCHAR | the prompt
    response_digest | VARCHAR | SHA-256 of the response, the first 16 hexadecimal digits
    labeller | VARCHAR | classifier:NAME@digest, endpoint:NAME@digest, or hand:NAME
    refused | BOOLEAN | its verdict; NULL: unclear, or a reply that is no verdict
    score | DOUBLE | a classifier's probability of refusal, 0-1; NULL: of another judge
    truncated | BOOLEAN | whether the judge saw only the beginning
    reply | VARCHAR | what an endpoint's judge wrote, on one line; NULL: of another judge
    number | BIGINT | of the answers of this labeller to this response, from 0; the last holds
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

SEQUENCE_KL = _columns("""
    protocol | VARCHAR | the study's protocol
    arm | VARCHAR | search preset
    trial | BIGINT | number of the trial
    prompt_id | VARCHAR | harmless prompt of the search split
    n_tokens | BIGINT | predicted tokens of the unedited response, its end included
    kl_first | DOUBLE | KL(unedited || edited) at the first token, nats: the KL of the ranking
    kl_sum | DOUBLE | sum over the response's tokens, nats
    kl_mean | DOUBLE | kl_sum / n_tokens, nats per token
    kl_max | DOUBLE | its largest value at one token, nats
    kl_max_at | BIGINT | that token's number, from 0
    changed | BIGINT | tokens where the edited model's likeliest token is not the unedited model's
    curve | FLOAT[] | mean KL, nats, at tokens 0, 1, 2-3, 4-7, 8-15, ... as far as the response goes
""")

CAPABILITIES = _columns("""
    protocol | VARCHAR | the study's protocol; NULL: the unedited model
    arm | VARCHAR | search preset, or unedited
    trial | BIGINT | number of the trial; NULL: unedited
    model | VARCHAR | key of the model artifact
    task | VARCHAR | name of the lm-eval task
    metric | VARCHAR | its metric
    filter | VARCHAR | what lm-eval did to the responses before; none: nothing
    higher_is_better | BOOLEAN | as the task says; NULL: it does not say
    value | DOUBLE | the metric, in its own unit
    stderr | DOUBLE | its standard error as lm-eval gives it; NULL: it gives none
    n | BIGINT | documents
    scores | FLOAT[] | the metric per document, in their order; NULL: no plain mean of documents
""")

COMPARISONS = _columns("""
    protocol_a | VARCHAR | protocol of trial a
    arm_a | VARCHAR | arm of trial a, or the control: unedited, identity, ...
    trial_a | BIGINT | number of trial a in its study; NULL: unedited
    protocol_b | VARCHAR | protocol of trial b
    arm_b | VARCHAR | as arm_a
    trial_b | BIGINT | as trial_a
    split | VARCHAR | search, selection or test
    metric | VARCHAR | refusals, overrefusals: 0-1; kl: nats
    n | BIGINT | prompts that both answered; every test pairs them
    a | DOUBLE | of trial a: a rate, or the mean KL
    b | DOUBLE | of trial b
    difference | DOUBLE | a - b: negative is better for a; NULL: a KL is not finite
    low | DOUBLE | lower end of its 95 % interval; NULL: as difference
    high | DOUBLE | upper end of its 95 % interval; NULL: as difference
    test | VARCHAR | which test gave p
    p | DOUBLE | two-sided, of this test alone; NULL: as difference
    p_holm | DOUBLE | adjusted by Holm over the metrics of this comparison; NULL: as difference
    detectable | DOUBLE | least difference that the test finds with 80 % power; NULL: none
    detectable_unpaired | DOUBLE | the same with other prompts for each; NULL: none
    both | BIGINT | prompts refused under both; NULL: not a rate
    only_a | BIGINT | prompts refused under a alone; NULL: not a rate
    only_b | BIGINT | prompts refused under b alone; NULL: not a rate
    neither | BIGINT | prompts refused under neither; NULL: not a rate
    verdict | VARCHAR | of this metric: better, tied or worse, a against b
    gated_a | BOOLEAN | whether a failed a gate
    gated_b | BOOLEAN | whether b failed a gate
    overall | VARCHAR | by the strict order: the first metric that is not tied decides
    decided_by | VARCHAR | that metric, or gates; NULL: tied
    ahead | DOUBLE | how often a ranks before b when the prompts are drawn again, 0-1
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
    "categories": CATEGORIES,
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
    "judgements": JUDGEMENTS,
    "retests": TRIALS,
    "reselections": TRIALS,
    "drift": DRIFT,
    "sequence_kl": SEQUENCE_KL,
    "capabilities": CAPABILITIES,
    "comparisons": COMPARISONS,
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
    "categories": (*CATEGORIES, _KEY),
    "models": (*MODELS, _KEY),
    "activations": (*ACTIVATIONS, Column("model", "VARCHAR", "key of the model artifact"), _KEY),
    "directions": (*DIRECTIONS, _KEY),
    "studies": (*STUDIES, *(c for c in PROTOCOL if c.name != "protocol")),
    "trials": (_STUDY, *TRIALS),
    "responses": (
        *_OF_TRIAL,
        *RESPONSE,
        JUDGEMENTS[1],
        Column("prompt", "VARCHAR", "the user's turn"),
        _KEY,
    ),
    "labels": (_STUDY, *LABELS),
    "judgements": (*JUDGEMENTS, _KEY),
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
    "sequence_kl": (_STUDY, *SEQUENCE_KL, _KEY),
    "capabilities": (_STUDY, *CAPABILITIES, _KEY),
    "comparisons": (
        *_columns("study_a | VARCHAR | study of trial a"),
        *_columns("study_b | VARCHAR | study of trial b"),
        *COMPARISONS,
        _CREATED,
        _KEY,
    ),
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
