-- On how many prompts do the two best trials differ?
-- The first two places of every search, trials a and b, prompt by prompt: refused by both, by one only, by
-- none. `p` is McNemar's exact test that prompts fall either way alike (before any correction for several
-- tests): above 0.05, the two are not told apart by this class of prompts, whatever their rank.
WITH placed AS (
    SELECT
        r.study, r.prompts, r.arm, r.trial,
        row_number() OVER (PARTITION BY r.study, r.prompts ORDER BY r.rank) AS place
    FROM ranking r
    JOIN studies s ON s.study = r.study AND s.arm = r.arm
    WHERE r.split = 'search' AND r.rank IS NOT NULL
    QUALIFY place <= 2
),
said AS (
    SELECT p.study, p.prompts, p.trial, p.place, x.class, x.prompt_id, x.refused
    FROM placed p
    JOIN responses x
        ON x.study = p.study AND x.split = 'search' AND x.prompts = p.prompts AND x.arm = p.arm AND x.trial = p.trial
),
pairs AS (
    SELECT
        x.study, x.prompts, x.class, any_value(x.trial) AS a, any_value(y.trial) AS b,
        count(*) FILTER (x.refused AND y.refused) AS a_and_b,
        count(*) FILTER (x.refused AND NOT y.refused) AS only_a,
        count(*) FILTER (y.refused AND NOT x.refused) AS only_b,
        count(*) FILTER (NOT x.refused AND NOT y.refused) AS neither
    FROM said x
    JOIN said y ON x.study = y.study AND x.prompts = y.prompts AND x.class = y.class AND x.prompt_id = y.prompt_id
    WHERE x.place = 1 AND y.place = 2
    GROUP BY x.study, x.prompts, x.class
)
SELECT
    study, class, a, b, a_and_b, only_a, only_b, neither,
    round(least(1, 2 * list_sum(list_transform(
        range(least(only_a, only_b) + 1),
        lambda i: exp(
            lgamma(only_a + only_b + 1) - lgamma(i + 1) - lgamma(only_a + only_b - i + 1)
            - (only_a + only_b) * ln(2)
        )
    ))), 4) AS p
FROM pairs
ORDER BY study, prompts, class
