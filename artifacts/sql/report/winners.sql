-- The winners of a study plan on the test split, in the strict order of each set of prompts, beside what their
-- unedited models refuse there, with the first-token KL of every harmless prompt.
WITH tested AS (FROM stored_tests WHERE key IN $tests)
SELECT
    row_number() OVER (
        PARTITION BY w.prompts
        ORDER BY
            coalesce(w.gated, true), w.refusals NULLS LAST, w.overrefusals NULLS LAST, w.kl NULLS LAST,
            w.trial NULLS LAST, w.arm, s.study
    ) AS rank,
    s.study, w.arm, w.trial, w.prompts,
    w.refusals, w.n_harmful, w.answered_harmful,
    w.overrefusals, w.n_harmless, w.n_borderline,
    w.kl, w.gated, w.gate_reason, coalesce(w.stopped, false) AS stopped, w.labeller,
    u.refusals AS unedited_refusals, u.overrefusals AS unedited_overrefusals,
    list_transform(list_filter(w.responses, lambda x: x.kl IS NOT NULL), lambda x: x.kl) AS kls,
    w.key
FROM tested w
JOIN studies s ON s.protocol = w.protocol AND s.arm = w.arm
JOIN tested u ON u.key = w.key AND u.arm = 'unedited'
ORDER BY w.prompts, rank
