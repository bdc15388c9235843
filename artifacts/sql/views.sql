-- The documented views, over the tables stored_KIND that the catalog lays over the Parquet files.
-- Columns, meanings and units: artifacts/schemas.py, printed by `tribunal sql --schema`.

CREATE VIEW prompts AS FROM stored_prompts;
CREATE VIEW near_duplicates AS FROM stored_near_duplicates;
CREATE VIEW categories AS FROM stored_categories;
CREATE VIEW models AS FROM stored_models;
CREATE VIEW directions AS FROM stored_directions;

CREATE VIEW activations AS
SELECT a.* EXCLUDE (key), json_extract_string(m.inputs, '$.model.key') AS model, a.key
FROM stored_activations a
LEFT JOIN artifacts m ON m.kind = 'activations' AND m.key = a.key;

CREATE VIEW studies AS
SELECT s.* EXCLUDE (key), p.* EXCLUDE (protocol, key)
FROM stored_studies s
JOIN stored_protocols p USING (protocol);

CREATE VIEW every_judged AS
SELECT * FROM stored_generations
UNION ALL BY NAME SELECT * FROM stored_selections
UNION ALL BY NAME SELECT * FROM stored_tests;

-- Which trials each artifact holds, from the first to the last: one row per artifact, arm and prompt sets. Ranges
-- that meet are one island.
CREATE VIEW held AS
SELECT * EXCLUDE (starts), sum(starts::INT) OVER (PARTITION BY protocol, arm, split, prompts ORDER BY first, key) AS island
FROM (
    SELECT *, coalesce(first > max(last) OVER (
        PARTITION BY protocol, arm, split, prompts
        ORDER BY first, key ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING
    ), true) AS starts
    FROM (
        SELECT
            protocol, arm, split, prompts, key,
            coalesce(min(trial), -1) AS first, coalesce(max(trial), -1) AS last
        FROM every_judged
        GROUP BY ALL
    )
);

-- A trial of an extended study is in several artifacts, with the same numbers: one row is enough. Looking for twins
-- only where ranges meet spares the other rows a sort, two thirds of the time of a large ranking.
CREATE VIEW judged_in_turn AS
WITH shared AS (
    SELECT unnest(list(key)) AS key FROM held GROUP BY protocol, arm, split, prompts, island HAVING count(*) > 1
)
SELECT * FROM every_judged WHERE key NOT IN (FROM shared)
UNION ALL BY NAME
SELECT * FROM every_judged WHERE key IN (FROM shared)
QUALIFY row_number() OVER (PARTITION BY protocol, arm, split, prompts, trial ORDER BY coalesce(stopped, false), key) = 1;

-- Of a trial that the finals heard to its end, that row takes the place of the one from the race.
CREATE VIEW heard AS
FROM stored_finals
QUALIFY row_number() OVER (PARTITION BY protocol, arm, split, prompts, trial ORDER BY key) = 1;

CREATE VIEW judged AS
FROM judged_in_turn j
ANTI JOIN heard h
    ON j.protocol = h.protocol AND j.trial = h.trial AND j.split = h.split AND j.prompts = h.prompts AND j.arm = h.arm
UNION ALL BY NAME FROM heard;

CREATE VIEW trials AS
SELECT s.study, j.* EXCLUDE (responses, key)
FROM judged j
JOIN stored_studies s USING (protocol);

CREATE VIEW responses AS
WITH every AS (
    SELECT s.study, j.arm, j.trial, j.split, j.prompts, j.key, unnest(j.responses, max_depth := 2)
    FROM judged j
    JOIN stored_studies s USING (protocol)
    UNION ALL BY NAME
    SELECT
        NULL AS study, 'unedited' AS arm, NULL AS trial, 'search' AS split, NULL AS prompts,
        b.* EXCLUDE (first_logits)
    FROM stored_baseline b
),
texts AS (SELECT prompt_id, any_value(text) AS prompt FROM stored_prompts GROUP BY prompt_id)
SELECT
    e.study, e.arm, e.trial, e.split, e.prompts,
    e.* EXCLUDE (study, arm, trial, split, prompts, key),
    left(sha256(e.response), 16) AS response_digest, t.prompt, e.key
FROM every e
LEFT JOIN texts t USING (prompt_id);

-- What judges say of responses: a person may answer again, and the last answer holds.
CREATE VIEW judgements AS
FROM stored_judgements
QUALIFY row_number() OVER (PARTITION BY labeller, prompt_id, response_digest ORDER BY number DESC, key) = 1;

-- The study's own labels lie beside the responses; relabelling adds artifacts of their own, and a judgement is a
-- label of every trial that gave the response.
CREATE VIEW labels AS
SELECT s.study, l.* EXCLUDE (key)
FROM (
    SELECT * EXCLUDE (answer), answer.class, answer.prompt_id, answer.refused
    FROM (
        SELECT protocol, arm, trial, split, labeller, key, unnest(responses) AS answer FROM judged
    )
) l
JOIN stored_studies s USING (protocol)
UNION BY NAME
SELECT s.study, l.* EXCLUDE (key)
FROM stored_labels l
JOIN stored_studies s USING (protocol)
UNION BY NAME
SELECT s.study, a.* EXCLUDE (response_digest), j.labeller, j.refused
FROM (
    SELECT * EXCLUDE (answer), answer.class, answer.prompt_id, left(sha256(answer.response), 16) AS response_digest
    FROM (SELECT protocol, arm, trial, split, unnest(responses) AS answer FROM judged)
) a
JOIN judgements j USING (prompt_id, response_digest)
JOIN stored_studies s USING (protocol);

CREATE VIEW winners AS
SELECT s.study, w.* EXCLUDE (key)
FROM stored_winners w
JOIN stored_studies s USING (protocol);

-- The prompt sets that each split of a protocol was judged on last.
CREATE VIEW newest_prompts AS
SELECT h.protocol, h.split, arg_max(h.prompts, a.created || h.key) AS prompts
FROM held h
JOIN artifacts a USING (key)
GROUP BY h.protocol, h.split;

-- Frozen winners held against what they measure now, newest first.
CREATE VIEW drift AS
SELECT
    s.study, d.* EXCLUDE (key), json_extract_string(a.inputs, '$.winner.key') AS winner, a.created, d.key
FROM stored_drift d
JOIN stored_studies s USING (protocol)
JOIN artifacts a ON a.kind = 'drift' AND a.key = d.key
ORDER BY a.created DESC, s.study, d.number DESC, d.arm = 'unedited', d.metric = 'mean_tokens',
    d.metric = 'degenerate', d.metric = 'kl', d.metric = 'overrefusals';

-- Winners and candidates as measured again: later than their study, so in none of its rankings.
CREATE VIEW remeasured AS
SELECT s.study, r.* EXCLUDE (responses, key), a.created, r.key
FROM (SELECT * FROM stored_retests UNION ALL BY NAME SELECT * FROM stored_reselections) r
JOIN stored_studies s USING (protocol)
JOIN artifacts a ON a.kind IN ('retests', 'reselections') AND a.key = r.key;

-- How far a trial is from the unedited model along its responses.
CREATE VIEW sequence_kl AS
SELECT s.study, k.*
FROM stored_sequence_kl k
JOIN stored_studies s USING (protocol);

-- Tasks of lm-eval. The unedited model belongs to no study, and is measured once for all of its studies.
CREATE VIEW capabilities AS
SELECT s.study, c.*
FROM stored_capabilities c
LEFT JOIN stored_studies s USING (protocol);

-- Two trials held against each other on the same prompts, a row per metric, newest first.
CREATE VIEW comparisons AS
WITH named AS (SELECT protocol, min(study) AS study FROM stored_studies GROUP BY protocol)
SELECT a.study AS study_a, b.study AS study_b, c.* EXCLUDE (key), m.created, c.key
FROM stored_comparisons c
LEFT JOIN named a ON a.protocol = c.protocol_a
LEFT JOIN named b ON b.protocol = c.protocol_b
JOIN artifacts m ON m.kind = 'comparisons' AND m.key = c.key
ORDER BY m.created DESC, c.key, c.metric = 'kl', c.metric = 'overrefusals';
-- What other tools found. A tool lists its finished trials by refusals, overrefusals (ICONOCLAST alone counts them),
-- then KL, and leaves out each that an earlier one equals or beats in (overrefusals, KL).
CREATE VIEW imported_trials AS
WITH scored AS (
    SELECT *, coalesce(state = 'COMPLETE', false) AND refusals IS NOT NULL AND kl IS NOT NULL AS is_scored,
        {'o': coalesce(overrefusals, 0), 'k': kl} AS cost
    FROM stored_imports
)
SELECT
    s.* EXCLUDE (key, is_scored, cost),
    CASE WHEN is_scored THEN row_number() OVER ordered END AS rank,
    CASE WHEN is_scored THEN isfinite(kl) AND coalesce(
        cost < min(cost) OVER (ordered ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING), true
    ) END AS listed,
    a.created, s.key
FROM scored s
JOIN artifacts a ON a.kind = 'imports' AND a.key = s.key
WINDOW ordered AS (
    PARTITION BY s.key, study, is_scored
    ORDER BY refusals, coalesce(overrefusals, 0), kl, trial NULLS LAST
);

-- Edits of other tools, or of trials here, rebuilt and judged; in no ranking of a study.
CREATE VIEW reproductions AS
SELECT r.* EXCLUDE (responses, key), a.created, r.key
FROM stored_reproductions r
JOIN artifacts a ON a.kind = 'reproductions' AND a.key = r.key;
