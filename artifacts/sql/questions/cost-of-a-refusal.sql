-- What does it cost in KL to remove one refusal more?
-- For every refusal count the trial of least KL that passed the gates, if no trial of fewer refusals costs
-- less. `each`: KL per refusal removed so far; `next`: KL per further one, against the row above. Both in
-- thousandths of a nat. A `next` that leaps up tells where the search pays for the last refusals with the
-- model.
WITH cheapest AS (
    SELECT study, prompts, refusals, min(kl) AS kl, arg_min(trial, (kl, trial)) AS trial
    FROM ranking
    WHERE split = 'search' AND rank IS NOT NULL AND NOT gated
    GROUP BY study, prompts, refusals
),
front AS (
    FROM cheapest
    QUALIFY kl < coalesce(min(kl) OVER (
        PARTITION BY study, prompts ORDER BY refusals ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING
    ), 'infinity'::DOUBLE)
)
SELECT
    f.study, f.trial, f.refusals, s.base_refusals - f.refusals AS removed, round(f.kl, 5) AS kl,
    round(1000 * f.kl / nullif(s.base_refusals - f.refusals, 0), 4) AS each,
    round(1000 * (f.kl - lag(f.kl) OVER steps) / (lag(f.refusals) OVER steps - f.refusals), 4) AS next
FROM front f
JOIN studies s ON s.study = f.study
WINDOW steps AS (PARTITION BY f.study, f.prompts ORDER BY f.refusals DESC)
ORDER BY f.study, f.prompts, f.refusals DESC
