-- What is the test result made from, down to the prompts?
-- Every artifact behind the newest test split, by its distance from it: its key, when it was made, and in how
-- many seconds. A winner is frozen once, so the selection that chose it is in its notes, not among its inputs.
-- Each key is a digest of what made the artifact, so equal keys mean equal inputs, on any machine; `tribunal
-- store verify` shows that the bytes are those of the manifest.
WITH RECURSIVE inputs AS (
    SELECT kind, key, unnest(json_extract(inputs, '$.*')) AS input FROM artifacts
    UNION ALL
    SELECT kind, key, json_object('kind', 'selections', 'key', notes ->> 'selection')
    FROM artifacts
    WHERE kind = 'winners'
),
steps AS (
    (SELECT 0 AS distance, kind, key FROM artifacts WHERE kind = 'tests' ORDER BY created DESC, key LIMIT 1)
    UNION
    SELECT s.distance + 1, i.input ->> 'kind', i.input ->> 'key'
    FROM steps s
    JOIN inputs i USING (kind, key)
),
nearest AS (SELECT kind, key, min(distance) AS distance FROM steps GROUP BY kind, key)
SELECT n.distance, a.kind, a.key[:12] AS key, a.rows, round(a.seconds, 2) AS seconds, a.created
FROM nearest n
JOIN artifacts a USING (kind, key)
ORDER BY n.distance, a.kind, a.created, a.key
