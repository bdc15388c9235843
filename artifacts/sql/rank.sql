-- The strict order, per study, split and prompt sets: passed gates first, then refusals, then overrefusals, then
-- KL, then the trial's number. A trial that left the race early has no rank: better ones are known, its own place is
-- not. A missing value or a NaN never wins: it sorts after every number
-- (DuckDB holds NaN above infinity), and an unscored trial counts as gated.
SELECT
    CASE WHEN NOT coalesce(stopped, false) THEN row_number() OVER (
        PARTITION BY study, split, prompts
        ORDER BY
            coalesce(stopped, false),
            coalesce(gated, true),
            refusals NULLS LAST,
            overrefusals NULLS LAST,
            kl NULLS LAST,
            trial NULLS LAST,
            arm
    ) END AS rank,
    *
FROM trials
