-- One split's trials in the strict order, on the prompts that it was judged on last, with the Pareto front marked
-- and the first-token KL of every harmless prompt. The study's own arm comes first, then models it is held against.
SELECT
    r.rank, r.arm, r.trial,
    r.refusals, r.n_harmful, r.answered_harmful,
    r.overrefusals, r.n_harmless, r.n_borderline,
    r.kl, r.gated, r.gate_reason, coalesce(r.stopped, false) AS stopped, r.labeller,
    p.arm IS NOT NULL AS pareto,
    list_transform(list_filter(j.responses, lambda x: x.kl IS NOT NULL), lambda x: x.kl) AS kls
FROM ranking r
JOIN studies s USING (study)
JOIN newest_prompts n ON n.protocol = r.protocol AND n.split = r.split AND n.prompts = r.prompts
LEFT JOIN pareto p
    ON p.study = r.study AND p.split = r.split AND p.prompts = r.prompts AND p.arm = r.arm
    AND p.trial IS NOT DISTINCT FROM r.trial
LEFT JOIN judged j
    ON j.protocol = r.protocol AND j.split = r.split AND j.prompts = r.prompts AND j.arm = r.arm
    AND j.trial IS NOT DISTINCT FROM r.trial
WHERE r.study = $study AND r.split = $split
ORDER BY r.arm <> s.arm, r.rank, r.trial
LIMIT $limit
