-- Did the search get better over time?
-- Per generation: trials, how many left the race early or failed a gate, the median KL, and the best so far in
-- the strict order (refusals and KL of that trial). The first generations are the sampler's start-up. A best
-- that has stood for many generations says that more trials will hardly help; a median that does not fall,
-- that the sampler is no better than chance.
WITH told AS (
    SELECT
        t.study, t.prompts, t.trial // s.generation_size AS generation, t.trial, t.kl, t.gated,
        coalesce(t.stopped, false) AS stopped,
        CASE WHEN NOT coalesce(t.stopped, false)
            THEN (coalesce(t.gated, true), t.refusals, t.overrefusals, t.kl, t.trial)
        END AS place
    FROM trials t
    JOIN studies s ON s.study = t.study AND s.arm = t.arm
    WHERE t.split = 'search'
),
steps AS (
    SELECT
        study, prompts, generation, count(*) AS trials, count(*) FILTER (stopped) AS stopped,
        count(*) FILTER (gated) AS gated, median(kl) AS median_kl, min(place) AS best
    FROM told
    GROUP BY study, prompts, generation
),
so_far AS (
    SELECT * EXCLUDE (best), min(best) OVER (PARTITION BY study, prompts ORDER BY generation) AS best FROM steps
)
SELECT
    study, generation AS gen, trials, stopped, gated, round(median_kl, 4) AS median_kl,
    best[5] AS best, best[2] AS refusals, round(best[4], 5) AS kl
FROM so_far
ORDER BY study, prompts, generation
