-- Do the frozen winners still measure as they did?
-- The last comparison of each study's newest winner: every metric before and now, and the 95 % interval of the
-- difference over paired prompts. `change` is of the metric, `verdict` of the winner. Comparisons are made by
-- `tribunal rebenchmark`; no interval means that nothing had changed and nothing was measured again.
SELECT
    d.study, d.arm, d.metric, round(d.before, 4) AS before, round(d.after, 4) AS after, round(d.low, 4) AS low,
    round(d.high, 4) AS high, d.change, d.verdict
FROM drift d
LEFT JOIN artifacts w ON w.kind = 'winners' AND w.key = d.winner
QUALIFY dense_rank() OVER (
    PARTITION BY d.study ORDER BY w.created DESC NULLS LAST, d.winner DESC, d.number DESC, d.key DESC
) = 1
ORDER BY d.study, d.arm = 'unedited', d.metric
