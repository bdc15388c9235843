"""The tables of the four figures: every stored column with its type, meaning and unit.

A kind listed in FIGURES is typed, checked and shown as a view of the same name.
"""

from __future__ import annotations

from artifacts.columns import Column, columns

# --- heads

_HEAD = """
    set | VARCHAR | prompt set by its name in the config; 'harmless' is the control
    class | VARCHAR | harmful or harmless
    ablation | VARCHAR | ua: Undifferentiated Attention, sc: Scaling Contribution"""
HEAD_EFFECTS = columns(
    _HEAD
    + """
    layer | BIGINT | layer of the silenced head, from 0
    head | BIGINT | its number among the layer's query heads, from 0
    prompts | BIGINT | prompts of the set
    ships | DOUBLE | mean over prompts of KL(intact || ablated) of the next token, nats
    angle | DOUBLE | Generalized Ships: left singular subspaces of last states, degrees
    angle_low | DOUBLE | low end of its 95 % bootstrap interval over prompts, degrees
    angle_high | DOUBLE | high end, degrees
    angle_top | DOUBLE | chance to be in the top by angle when prompts are resampled, 0-1
    feature_angle | DOUBLE | the same angle of the right singular (feature) subspaces, degrees
    parameters | BIGINT | parameters that the ablation of this head amounts to changing
    fraction | DOUBLE | the same as a fraction of the model's parameters, 0-1
    kl | FLOAT[] | KL(intact || ablated) of each prompt in the set's order, nats
"""
)
HEAD_SCORES = columns(
    _HEAD
    + """
    layer | BIGINT | layer of the silenced head, from 0
    head | BIGINT | its number among the layer's query heads, from 0
    prompts | BIGINT | prompts of the set
    ships | DOUBLE | mean over prompts of KL(intact || ablated) of the next token, nats
    ships_low | DOUBLE | low end of its 95 % bootstrap interval over prompts, nats
    ships_high | DOUBLE | high end, nats
    ships_rank | BIGINT | rank by ships within set and ablation, from 1
    ships_top | DOUBLE | chance to be in the top by ships when prompts are resampled, 0-1
    angle | DOUBLE | Generalized Ships: left singular subspaces of last states, degrees
    angle_low | DOUBLE | low end of its 95 % bootstrap interval over prompts, degrees
    angle_high | DOUBLE | high end, degrees
    angle_rank | BIGINT | rank by angle within set and ablation, from 1
    angle_top | DOUBLE | chance to be in the top by angle when prompts are resampled, 0-1
    feature_angle | DOUBLE | the same angle of the right singular (feature) subspaces, degrees
    feature_rank | BIGINT | rank by feature_angle within set and ablation, from 1
    fraction | DOUBLE | parameters that the ablation touches, of all the model's, 0-1
"""
)
HEAD_AGREEMENT = columns(
    """
    set_a | VARCHAR | one prompt set
    ablation_a | VARCHAR | and ablation
    set_b | VARCHAR | another
    ablation_b | VARCHAR | and its ablation
    heads | BIGINT | heads compared
    spearman | DOUBLE | rank correlation of the angles over heads, -1 to 1
    low | DOUBLE | low end of its 95 % bootstrap interval over heads
    high | DOUBLE | high end
    top | BIGINT | size of each top list
    shared | BIGINT | heads in both top lists
    expected | DOUBLE | heads that two random lists would share on average
"""
)
HEAD_GROUPS = columns(
    _HEAD
    + """
    step | BIGINT | size of the group after this step, from 1
    layer | BIGINT | layer of the head that joins
    head | BIGINT | its number in the layer
    angle | DOUBLE | Generalized Ships of the group against the intact model, degrees
    ships | DOUBLE | mean KL(intact || group silenced) of the next token, nats
    parameters | BIGINT | parameters that silencing the group amounts to changing
    fraction | DOUBLE | the same as a fraction of the model's parameters, 0-1
"""
)
HEAD_ANSWERS = columns(
    """
    ablation | VARCHAR | ua or sc
    group_kind | VARCHAR | nothing (the intact model), found (greedy) or random
    set | VARCHAR | the set a found group was chosen on; NULL for others
    draw | BIGINT | number of a random group's draw, from 0; NULL for others
    size | BIGINT | heads in the group
    heads | VARCHAR | the group as layer.head, separated by spaces
    prompt_id | VARCHAR | prompt of the held-out set
    response | VARCHAR | greedy answer with the group silenced in prompt and response
"""
)
HEAD_REFUSALS = columns(
    _HEAD
    + """
    size | BIGINT | heads in the greedy group
    heads | VARCHAR | the group as layer.head, separated by spaces
    fraction | DOUBLE | parameters that silencing it touches, of all the model's, 0-1
    n | BIGINT | held-out harmful prompts
    refusals | BIGINT | of them refused
    rate | DOUBLE | refusals / n
    rate_low | DOUBLE | low end of its 95 % Clopper-Pearson interval
    rate_high | DOUBLE | high end
    base_rate | DOUBLE | refusal rate of the intact model on the same prompts
    change | DOUBLE | rate - base_rate
    change_low | DOUBLE | low end of its 95 % interval, prompts resampled in pairs
    change_high | DOUBLE | high end
    draws | BIGINT | random groups of this size
    random_rate | DOUBLE | mean refusal rate over the random groups
    random_low | DOUBLE | low end of its 95 % interval, groups and prompts resampled
    random_high | DOUBLE | high end
    beyond | DOUBLE | rate - random_rate: what the choice of heads adds; below 0: more removed
    beyond_low | DOUBLE | low end of its 95 % interval, groups and prompts resampled together
    beyond_high | DOUBLE | high end
    as_low | DOUBLE | share of random groups, this one counted, with a rate as low; the p value
"""
)

# --- norms

NORMS_PROMPTS = columns("""
    class | VARCHAR | benign, jailbreak or control (benign requests in the jailbreaks' templates)
    prompt_id | VARCHAR | of the prompts view
    n_tokens | BIGINT | length of the whole prompt, chat template included, tokens
    state | BIGINT | 0: entering layer 0; l + 1: leaving layer l, before any final norm
    log_norms | FLOAT[] | ln of the state's L2 norm, nats, by position from 0; NULL: a zero state
""")

NORMS_MAPS = columns("""
    variant | VARCHAR | all; length matched: as many jailbreaks as benign prompts of every length
    panel | VARCHAR | benign, jailbreak, control; difference: jailbreak - benign
    state | BIGINT | 0: entering layer 0; l + 1: leaving layer l
    position | BIGINT | token of the prompt, from 0; 0 is drawn apart
    value | DOUBLE | mean over prompts of ln of the L2 norm; difference of two such means, nats
    error | DOUBLE | its standard error, nats; NULL below two prompts
    n | BIGINT | prompts with a token there; of a difference, of the class with fewer
    shown | BOOLEAN | whether n is at least norms.least: other cells are blank in the picture
""")

NORMS_STATES = columns("""
    comparison | VARCHAR | all; length matched; templates: jailbreak - control
    state | BIGINT | 0: entering layer 0; l + 1: leaving layer l
    difference | DOUBLE | mean of the map's difference over shown positions from 1 on, nats
    low | DOUBLE | of its 95 % interval, bootstrap over prompts
    high | DOUBLE | of its 95 % interval
    positions | BIGINT | positions averaged over
    n_jailbreak | BIGINT | prompts of the class that is compared
    n_other | BIGINT | benign prompts, or those of the control
""")

NORMS_PROBABILITIES = columns("""
    detector | VARCHAR | factors; factors with control; shuffled labels; length (no layer)
    draw | BIGINT | permutation of shuffled labels, from 0; 0 for the others
    layer | BIGINT | layer whose output is decomposed, from 0; NULL: of no layer
    class | VARCHAR | benign, jailbreak or control; none of them fitted on
    prompt_id | VARCHAR | of the prompts view
    probability | DOUBLE | of being a jailbreak, 0-1
    template | VARCHAR | template of a jailbreak; NULL: not told
    fitted_template | BOOLEAN | whether the detector was fitted on that template; NULL: not told
""")

NORMS_DETECTION = columns("""
    detector | VARCHAR | factors; factors with control; shuffled labels; length
    layer | BIGINT | layer whose output is decomposed, from 0; NULL: of no layer
    against | VARCHAR | benign or control: what jailbreaks are told apart from
    jailbreaks | VARCHAR | all; new templates: of templates the detector was not fitted on
    metric | VARCHAR | auroc; f1 (at norms.threshold); fpr_at_95_tpr
    value | DOUBLE | the metric on held-out prompts, 0-1; of shuffled labels, mean over permutations
    low | DOUBLE | 95 % interval, bootstrap over prompts; of shuffled labels, over permutations
    high | DOUBLE | its other end
    n_jailbreak | BIGINT | jailbreaks scored
    n_other | BIGINT | prompts of the other class scored
""")

NORMS_ANSWERS = columns("""
    arm | VARCHAR | unedited; susceptible: layers by probability; random: as many at random
    at_most | BIGINT | most layers bypassed per prompt; 0: unedited
    class | VARCHAR | benign, jailbreak or control
    prompt_id | VARCHAR | of the prompts view
    layers | VARCHAR | layers bypassed while this prompt was answered, between commas
    response | VARCHAR | the answer
    refused | BOOLEAN | by norms.judging.labeller
    degenerate | VARCHAR | why the answer is broken text; NULL: it is not
""")

NORMS_BYPASS = columns("""
    arm | VARCHAR | susceptible; random; susceptible - random (paired difference)
    at_most | BIGINT | most layers bypassed per prompt
    class | VARCHAR | benign, jailbreak or control
    outcome | VARCHAR | refused, broken or answered, of prompts that were answered unedited
    k | BIGINT | prompts with this outcome; NULL: of a difference
    n | BIGINT | prompts that the unedited model answered: not refused, no broken text
    rate | DOUBLE | k / n, or the difference of two rates
    low | DOUBLE | of its 95 % interval: Clopper-Pearson; of a difference, bootstrap over prompts
    high | DOUBLE | of its 95 % interval
    mean_layers | DOUBLE | layers bypassed per prompt, mean
""")

# --- activity

ACTIVITY_QUESTIONS = columns("""
    question | BIGINT | number of the question, from 0
    prompt_id | VARCHAR | digest of the normalised text and system prompt, 16 hexadecimal digits
    text | VARCHAR | the user's turn
    system_prompt | VARCHAR | the system turn; NULL: the model's own
    kind | VARCHAR | kind of question
    true_answer | VARCHAR | the right answer
    false_answer | VARCHAR | a wrong one
    odd_answer | VARCHAR | a right one in unusual words; NULL: none
""")
ACTIVITY_ANSWERS = columns("""
    question | BIGINT | number of the question, from 0
    condition | VARCHAR | true, false, odd: forced on the model; generated: its own, greedily
    kind | VARCHAR | kind of question
    text | VARCHAR | the user's turn
    answer | VARCHAR | the answer
    verdict | VARCHAR | of a generated answer: true, false or neither, by the words that differ
    n_tokens | BIGINT | tokens of the answer
    prompt_tokens | VARCHAR | token ids of the rendered prompt, separated by spaces
    answer_tokens | VARCHAR | token ids of the answer, separated by spaces
""")
ACTIVITY_STATES = columns("""
    question | BIGINT | number of the question, from 0
    condition | VARCHAR | true or false
    state | BIGINT | 0: embedding output; s: output of layer s-1
    vector | FLOAT[] | residual at the last answer token, or mean over its tokens, as the key says
""")
ACTIVITY_DIRECTIONS = columns("""
    direction | VARCHAR | pca, mean, probe: from pairs; refusal; random, shuffled: controls
    draw | BIGINT | number of the draw of a control, from 0
    state | BIGINT | 0: embedding output; s: output of layer s-1
    explained | DOUBLE | share of the fitted pairs' second moment along it, 0-1; NULL: no pairs
    fitted_right | DOUBLE | share of the fitted pairs in which false lies further along it, 0-1
    vector | FLOAT[] | unit vector; zeros where there is none
""")
ACTIVITY_PROJECTIONS = columns("""
    question | BIGINT | number of the question, from 0
    condition | VARCHAR | true, false, odd or generated
    position | BIGINT | token of the answer, from 0
    token | VARCHAR | its text
    surprise | DOUBLE | -ln of the probability that the model gave it, nats
    state | BIGINT | 0: embedding output; s: output of layer s-1
    projections | FLOAT[] | scalar products with the directions, in the order of activity_directions
""")
ACTIVITY_SCALES = columns("""
    direction | VARCHAR | pca, mean, probe, refusal, random or shuffled
    draw | BIGINT | number of the draw of a control, from 0
    state | BIGINT | 0: embedding output; s: output of layer s-1
    n_tokens | BIGINT | tokens of neutral text
    mean | DOUBLE | mean projection of those tokens, residual units
    deviation | DOUBLE | its standard deviation, residual units; 0: no score can be had
""")
ACTIVITY_SCORES = columns("""
    question | BIGINT | number of the question, from 0
    condition | VARCHAR | true, false, odd: forced on the model; generated: its own
    kind | VARCHAR | kind of question
    position | BIGINT | token of the answer, from 0
    token | VARCHAR | its text
    surprise | DOUBLE | -ln of the probability that the model gave it, nats
    state | BIGINT | 0: embedding output; s: output of layer s-1
    projection | DOUBLE | scalar product with the direction, residual units
    score | DOUBLE | clip((projection - mean) / deviation, -2, 2) by neutral text; NULL: no scale
""")
ACTIVITY_LAYERS = columns("""
    direction | VARCHAR | as in activity_directions; surprise: none, but mean nats per token
    higher | VARCHAR | condition whose answers should score higher
    lower | VARCHAR | condition they are compared with
    kind | VARCHAR | kind of question, or all
    state | BIGINT | 0: embedding output; s: output of layer s-1; NULL for surprise
    n | BIGINT | questions
    draws | BIGINT | directions; of several, rates are means and intervals their 95 % range
    right | DOUBLE | mean number of pairs in which `higher` lies further along the direction
    accuracy | DOUBLE | right / n, 0-1; ties are not right; NULL where all are ties
    accuracy_low | DOUBLE | its lower bound: Clopper-Pearson 95 %, or 2.5 % quantile over draws
    accuracy_high | DOUBLE | its upper bound
    auroc | DOUBLE | of the answers' mean scores, 0-1
    auroc_low | DOUBLE | its lower bound: bootstrap over questions 95 %, or quantile over draws
    auroc_high | DOUBLE | its upper bound
""")

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
    "head_effects": HEAD_EFFECTS,
    "head_scores": HEAD_SCORES,
    "head_agreement": HEAD_AGREEMENT,
    "head_groups": HEAD_GROUPS,
    "head_answers": HEAD_ANSWERS,
    "head_refusals": HEAD_REFUSALS,
    # norms
    "norms_prompts": NORMS_PROMPTS,
    "norms_maps": NORMS_MAPS,
    "norms_states": NORMS_STATES,
    "norms_probabilities": NORMS_PROBABILITIES,
    "norms_detection": NORMS_DETECTION,
    "norms_answers": NORMS_ANSWERS,
    "norms_bypass": NORMS_BYPASS,
    # activity
    "activity_questions": ACTIVITY_QUESTIONS,
    "activity_answers": ACTIVITY_ANSWERS,
    "activity_states": ACTIVITY_STATES,
    "activity_directions": ACTIVITY_DIRECTIONS,
    "activity_projections": ACTIVITY_PROJECTIONS,
    "activity_scales": ACTIVITY_SCALES,
    "activity_scores": ACTIVITY_SCORES,
    "activity_layers": ACTIVITY_LAYERS,
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
