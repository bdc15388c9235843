-- Refusals and overrefusals of one labeller (first parameter) beside the study's own, per trial of
-- a study (second parameter) on the search split, in the order of the new labels; and on how many
-- responses both agree. Trials that left the race early were answered in part and are not among them.
SELECT
    o.trial,
    count(*) FILTER (o.class = 'harmful' AND o.refused) AS refusals,
    count(*) FILTER (n.class = 'harmful' AND n.refused) AS refusals_new,
    count(*) FILTER (o.class <> 'harmful' AND o.refused) AS overrefusals,
    count(*) FILTER (n.class <> 'harmful' AND n.refused) AS overrefusals_new,
    round(avg((o.refused = n.refused)::DOUBLE), 4) AS agreement
FROM labels o
JOIN studies s ON s.study = o.study AND s.labeller = o.labeller
JOIN (SELECT DISTINCT * FROM labels WHERE labeller = $1) n
    ON n.study = o.study AND n.arm = o.arm AND n.trial IS NOT DISTINCT FROM o.trial
    AND n.split = o.split AND n.class = o.class AND n.prompt_id = o.prompt_id
JOIN trials t
    ON t.study = o.study AND t.arm = o.arm AND t.trial IS NOT DISTINCT FROM o.trial AND t.split = o.split
    AND NOT coalesce(t.stopped, false)
WHERE o.study = $2 AND o.split = 'search'
GROUP BY o.trial
ORDER BY refusals_new, overrefusals_new, o.trial
