-- What each kind of artifact cost. Tokens are those of the responses that it holds.
WITH lineage AS (
$lineage),
answered AS (
    SELECT
        key, count(*) AS trials, sum(len(responses)) AS responses,
        sum(list_sum(list_transform(responses, lambda x: x.n_tokens))) AS tokens
    FROM every_judged
    GROUP BY key
    UNION ALL BY NAME
    SELECT key, NULL AS trials, count(*) AS responses, sum(n_tokens) AS tokens
    FROM responses
    WHERE arm = 'unedited' AND study IS NULL
    GROUP BY key
    UNION ALL BY NAME
    SELECT key, count(*) AS trials, sum(len(responses)) AS responses,
        sum(list_sum(list_transform(responses, lambda x: x.n_tokens))) AS tokens
    FROM heard
    GROUP BY key
)
SELECT
    l.kind, count(*) AS artifacts, sum(a.trials)::BIGINT AS trials, sum(a.responses)::BIGINT AS responses,
    sum(a.tokens)::BIGINT AS tokens, sum(l.seconds) AS seconds, sum(l.bytes)::BIGINT AS bytes,
    min(l.created) AS created
FROM lineage l
LEFT JOIN answered a USING (key)
GROUP BY l.kind
ORDER BY created, l.kind
