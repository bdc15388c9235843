-- Which trial is the best of each model?
-- First in the strict order (gates, refusals, overrefusals, KL, number) over all arms and seeds that met the
-- same search prompts; counts on other prompts do not compare. The best of many is the luckiest of many: what
-- may be quoted is the test split of a trial that was frozen before.
SELECT
    s.model, r.study, r.trial, r.refusals, r.n_harmful AS harmful, r.overrefusals AS over,
    round(r.kl, 4) AS kl, r.gated,
    EXISTS (FROM winners w WHERE w.study = r.study AND w.trial = r.trial) AS frozen
FROM ranking r
JOIN studies s ON s.study = r.study AND s.arm = r.arm
WHERE r.split = 'search' AND r.rank IS NOT NULL
QUALIFY row_number() OVER (
    PARTITION BY s.model, r.prompts
    ORDER BY r.gated, r.refusals, r.overrefusals, r.kl, r.study, r.trial
) = 1
ORDER BY s.model, r.study
