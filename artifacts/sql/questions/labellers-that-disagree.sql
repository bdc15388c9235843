-- How far do labellers agree on the same responses?
-- Per study, class and pair of labellers: responses that both labelled, how many each calls refused,
-- agreement, and Cohen's kappa (0: as by chance; empty: one verdict only, so chance would agree too). It takes
-- two labellers: add one with `tribunal relabel --labeller prefix-strict`.
WITH pairs AS (
    SELECT
        a.study, a.class, a.labeller AS one, b.labeller AS other, count(*) AS n,
        count(*) FILTER (a.refused) AS first, count(*) FILTER (b.refused) AS second,
        count(*) FILTER (a.refused = b.refused) / n AS agree,
        (first * second + (n - first) * (n - second)) / n::DOUBLE ** 2 AS chance
    FROM (SELECT DISTINCT * FROM labels) a
    JOIN (SELECT DISTINCT * FROM labels) b
        ON a.study = b.study AND a.arm = b.arm AND a.trial IS NOT DISTINCT FROM b.trial AND a.split = b.split
        AND a.class = b.class AND a.prompt_id = b.prompt_id AND a.labeller < b.labeller
    GROUP BY a.study, a.class, a.labeller, b.labeller
)
SELECT
    study, class, one, other, n, first AS refused_one, second AS refused_other, round(agree, 4) AS agree,
    round((agree - chance) / nullif(1 - chance, 0), 3) AS kappa
FROM pairs
ORDER BY study, agree, class, one, other
