-- Where do the time and the tokens go?
-- Per kind of artifact: how many there are, the seconds that making them took, and the responses and response
-- tokens in them. Seconds are of the process that made the artifact, so workers side by side add up to more
-- than the clock; what was found stored cost nothing and is not counted again. Trials that left the race early
-- count with what they had answered.
WITH told AS (
    SELECT key, count(*) AS responses, sum(n_tokens + ended::INT) AS tokens FROM responses GROUP BY key
)
SELECT
    a.kind, count(*) AS artifacts, round(sum(a.seconds), 1) AS seconds,
    round(100 * sum(a.seconds) / sum(sum(a.seconds)) OVER (), 1) AS percent,
    sum(t.responses)::BIGINT AS responses, sum(t.tokens)::BIGINT AS tokens,
    round(sum(t.tokens) / nullif(sum(a.seconds), 0))::BIGINT AS per_second
FROM artifacts a
LEFT JOIN told t ON t.key = a.key
GROUP BY a.kind
ORDER BY seconds DESC, a.kind
