-- The exact Pareto front of refusals, overrefusals and KL, per study, split and prompt sets: ungated trials that
-- no other ungated trial equals or beats in all three while beating it in one.
-- Trials of equal counts share a cell, of which only the least KL can be on the front; a cell that one of equal
-- refusals and fewer overrefusals beats is gone before every cell left is held against every other.
WITH eligible AS (
    SELECT * FROM trials
    WHERE NOT coalesce(gated, true) AND NOT coalesce(stopped, false) AND kl IS NOT NULL
),
cells AS (
    SELECT study, split, prompts, refusals, overrefusals, min(kl) AS kl
    FROM eligible
    WHERE refusals IS NOT NULL AND overrefusals IS NOT NULL
    GROUP BY ALL
),
steps AS (
    SELECT * FROM cells
    QUALIFY coalesce(kl < min(kl) OVER (
        PARTITION BY study, split, prompts, refusals
        ORDER BY overrefusals ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING
    ), true)
),
front AS (
    FROM steps c
    WHERE NOT EXISTS (
        FROM steps o
        WHERE o.study = c.study AND o.split = c.split AND o.prompts IS NOT DISTINCT FROM c.prompts
          AND o.refusals < c.refusals AND o.overrefusals <= c.overrefusals AND o.kl <= c.kl
    )
)
FROM eligible t
WHERE t.refusals IS NULL OR t.overrefusals IS NULL OR EXISTS (
    FROM front f
    WHERE f.study = t.study AND f.split = t.split AND f.prompts IS NOT DISTINCT FROM t.prompts
      AND f.refusals = t.refusals AND f.overrefusals = t.overrefusals AND t.kl <= f.kl
)
