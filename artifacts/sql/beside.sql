-- Trials of one's own study (first parameter; on the search prompts judged last) and of every imported file, by the
-- strict order of rates: those whose KL passes the gate first, then refusals, overrefusals, KL. Their prompts differ,
-- so a place is no verdict; within one file or study it is. What a tool does not count (HERETIC: overrefusals) sorts
-- after what was counted.
WITH own AS (
    SELECT
        r.study AS source, 'tribunal' AS tool, r.trial AS trial, r.refusals, r.n_harmful, r.overrefusals,
        r.n_harmless + r.n_borderline AS n_overrefusal, r.kl, coalesce(r.gated, true) AS gated, r.rank
    FROM ranking r
    JOIN newest_prompts n USING (protocol, split)
    WHERE r.study = $1 AND r.split = 'search' AND r.prompts = n.prompts AND r.rank IS NOT NULL
),
peers AS (
    SELECT
        source, tool, coalesce(listed_as, trial) AS trial, refusals, n_harmful, overrefusals,
        n_harmless AS n_overrefusal, kl, NOT coalesce(kl <= 0.5, false) AS gated, rank
    FROM imported_trials
    WHERE rank IS NOT NULL
)
SELECT
    row_number() OVER (
        ORDER BY gated, refusals / n_harmful NULLS LAST, overrefusals / n_overrefusal NULLS LAST, kl, source, rank
    ) AS place,
    *
FROM (FROM own UNION ALL BY NAME FROM peers)
ORDER BY place
