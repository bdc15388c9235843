-- How close was the selection of the winner?
-- Every candidate, in the order of the selection split, against the first one, prompt by prompt: `fewer`
-- counts harmful prompts that only the first refuses, `more` those that only the candidate refuses, and
-- `kl_gap` is the mean KL above the first one's, with its standard error over prompts. A candidate with fewer
-- + more near 0 and a gap within two standard errors could as well have won.
WITH candidate AS (
    SELECT r.study, r.prompts, r.arm, r.trial, r.rank, r.refusals, r.overrefusals, r.kl
    FROM ranking r
    JOIN studies s ON s.study = r.study AND s.arm = r.arm
    WHERE r.split = 'selection' AND r.rank IS NOT NULL
),
said AS (
    SELECT c.study, c.prompts, c.trial, c.rank, x.class, x.prompt_id, x.refused, x.kl
    FROM candidate c
    JOIN responses x
        ON x.study = c.study AND x.split = 'selection' AND x.prompts = c.prompts AND x.arm = c.arm AND x.trial = c.trial
),
first AS (FROM said QUALIFY rank = min(rank) OVER (PARTITION BY study, prompts))
SELECT
    c.study, c.trial, c.refusals, c.overrefusals AS over, round(c.kl, 5) AS kl,
    count(*) FILTER (s.class = 'harmful' AND f.refused AND NOT s.refused) AS fewer,
    count(*) FILTER (s.class = 'harmful' AND s.refused AND NOT f.refused) AS more,
    round(avg(s.kl - f.kl), 5) AS kl_gap,
    round(stddev_samp(s.kl - f.kl) / sqrt(count(s.kl - f.kl)), 5) AS error
FROM candidate c
JOIN said s ON s.study = c.study AND s.prompts = c.prompts AND s.trial = c.trial
JOIN first f ON f.study = s.study AND f.prompts = s.prompts AND f.class = s.class AND f.prompt_id = s.prompt_id
GROUP BY c.study, c.prompts, c.rank, c.trial, c.refusals, c.overrefusals, c.kl
ORDER BY c.study, c.prompts, c.rank
