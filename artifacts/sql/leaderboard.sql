-- The ranking, in the columns of the leaderboard, with the exact Pareto front marked.
SELECT
    r.rank, r.study, r.protocol, r.arm, r.trial, r.split, r.prompts,
    r.n_harmful, r.answered_harmful, r.refusals, r.n_harmless, r.n_borderline, r.overrefusals, r.kl,
    r.gated, r.gate_reason, coalesce(r.stopped, false) AS stopped,
    p.arm IS NOT NULL AS pareto
FROM ranking r
LEFT JOIN pareto p
    ON p.study = r.study AND p.split = r.split AND p.prompts IS NOT DISTINCT FROM r.prompts AND p.arm = r.arm
    AND p.trial IS NOT DISTINCT FROM r.trial
ORDER BY r.study, r.split, r.prompts, r.rank, r.trial
