"""The tables of the four figures: every stored column with its type, meaning and unit.

A kind listed in FIGURES is typed, checked and shown as a view of the same name.
"""

from __future__ import annotations

from artifacts.columns import Column, columns

# --- heads

# --- norms

# --- activity

# --- divergence

_ANSWER_OF = columns("""
    split | VARCHAR | calibration (lines and combination are set on it) or test
    prompt_id | VARCHAR | 16 hexadecimal digits of the question's text and system prompt
""")
DIVERGENCE_QUESTIONS = (
    *_ANSWER_OF,
    *columns("""
    row | BIGINT | row of the source, from 0
    text | VARCHAR | the user's turn: question, with its theory if it has one
    system_prompt | VARCHAR | system prompt; NULL: the model's own
    gold | VARCHAR | the right answer
    kind | VARCHAR | kind of question; of ProofWriter the depth of the proof
    topic | VARCHAR | what questions share that are resampled together: a theory's digest
"""),
)
DIVERGENCE_MEASURES = (
    *_ANSWER_OF,
    *columns("""
    answer | VARCHAR | greedy answer, without special tokens
    ended | BOOLEAN | whether it ended by itself within max_new_tokens
    tokens | BIGINT | generated tokens, an end-of-sequence token included
    entropy_sum | DOUBLE | sum over those tokens of the next-token entropy, nats
    entropy_mean | DOUBLE | the same per token, nats
    js_late | DOUBLE | Jensen-Shannon divergence of late layers against the last, mean, nats
    js_adjacent | DOUBLE | of each late layer against the next one, mean, nats
    js_all | DOUBLE | of every layer but the last against the last, mean, nats
    js_layers | FLOAT[] | of each layer but the last against the last, mean over tokens, nats
    agreed | BIGINT | tokens that the teacher-forced pass would choose too
"""),
)
DIVERGENCE_ANSWERS = (
    *_ANSWER_OF,
    *columns("""
    kind | VARCHAR | kind of question
    topic | VARCHAR | what is resampled together
    question | VARCHAR | the user's turn
    gold | VARCHAR | the right answer
    answer | VARCHAR | the generated one
    prediction | VARCHAR | what the answer says, in normal form; empty: nothing that can be told
    parsed | BOOLEAN | whether it says anything that can be told
    correct | BOOLEAN | whether that is the gold answer
    ended | BOOLEAN | whether the answer ended by itself
    tokens | BIGINT | generated tokens
    entropy_sum | DOUBLE | nats, summed over tokens
    entropy_mean | DOUBLE | nats per token
    js_late | DOUBLE | nats, late layers against the last
    js_adjacent | DOUBLE | nats, late layers against their neighbours
    js_all | DOUBLE | nats, all layers against the last
    combined | DOUBLE | held-out probability of being incorrect by all of these, 0-1; NULL: unfitted
"""),
)
DIVERGENCE_KINDS = columns("""
    split | VARCHAR | calibration or test
    kind | VARCHAR | kind of question; 'all'
    n | BIGINT | answers
    correct | BIGINT | correct ones
    accuracy | DOUBLE | fraction correct, 0-1
    low | DOUBLE | lower end of its 95 % interval (Clopper-Pearson), 0-1
    high | DOUBLE | upper end
    unparsed | BIGINT | answers that say nothing that can be told; counted as incorrect
    tokens | DOUBLE | mean length, tokens
""")
DIVERGENCE_LINES = columns("""
    line | VARCHAR | what sets the horizontal line: lowest-entropy or youden
    mode | VARCHAR | which Jensen-Shannon divergence it cuts
    entropy | DOUBLE | vertical line: lowest entropy sum of an incorrect answer, nats; or NULL
    js | DOUBLE | horizontal line, nats; NULL: it cannot be set
    prompt_id | VARCHAR | the answer that sets the vertical line
    n | BIGINT | calibration answers
    incorrect | BIGINT | incorrect ones
""")
DIVERGENCE_QUADRANTS = columns("""
    line | VARCHAR | what sets the horizontal line
    split | VARCHAR | calibration (the lines were set on it) or test
    entropy | VARCHAR | low: below the vertical line; high: on it or above
    js | VARCHAR | low: below the horizontal line; high: on it or above
    n | BIGINT | answers there
    correct | BIGINT | correct ones
    accuracy | DOUBLE | fraction correct, 0-1; NULL: no answer there
    low | DOUBLE | lower end of its 95 % interval (Clopper-Pearson), 0-1
    high | DOUBLE | upper end
""")
DIVERGENCE_SCORES = columns("""
    split | VARCHAR | calibration or test
    score | VARCHAR | entropy_sum, entropy_mean, js_late, js_adjacent, js_all, tokens, combined
    n | BIGINT | answers
    incorrect | BIGINT | incorrect ones
    auroc | DOUBLE | probability that an incorrect answer scores higher than a correct one, 0-1
    auroc_low | DOUBLE | lower end of its 95 % bootstrap interval over topics
    auroc_high | DOUBLE | upper end
    within | DOUBLE | the same over pairs of answers to questions of one kind
    within_low | DOUBLE | lower end
    within_high | DOUBLE | upper end
    parsed | DOUBLE | the same over answers that say something that can be told
    parsed_low | DOUBLE | lower end
    parsed_high | DOUBLE | upper end
    gain | DOUBLE | auroc less that of the length in tokens, on the same answers
    gain_low | DOUBLE | lower end of its 95 % interval, paired
    gain_high | DOUBLE | upper end
    aurc | DOUBLE | area under the risk-coverage curve, 0-1; the error rate if a score knows nothing
    aurc_low | DOUBLE | lower end
    aurc_high | DOUBLE | upper end
""")
DIVERGENCE_RISK = columns("""
    score | VARCHAR | as in divergence_scores; test split
    threshold | DOUBLE | answers with a score of at most this are accepted; unit of the score
    accepted | BIGINT | how many they are
    coverage | DOUBLE | fraction of answers accepted, 0-1
    risk | DOUBLE | fraction of accepted answers that are incorrect, 0-1
    low | DOUBLE | lower end of its 95 % interval (Clopper-Pearson), 0-1
    high | DOUBLE | upper end
""")

FIGURES: dict[str, tuple[Column, ...]] = {
    # heads
    # norms
    # activity
    # divergence
    "divergence_questions": DIVERGENCE_QUESTIONS,
    "divergence_measures": DIVERGENCE_MEASURES,
    "divergence_answers": DIVERGENCE_ANSWERS,
    "divergence_kinds": DIVERGENCE_KINDS,
    "divergence_lines": DIVERGENCE_LINES,
    "divergence_quadrants": DIVERGENCE_QUADRANTS,
    "divergence_scores": DIVERGENCE_SCORES,
    "divergence_risk": DIVERGENCE_RISK,
}
