-- Every artifact that a study was made from: what belongs to its protocol, and, again and again, its inputs.
WITH RECURSIVE
edges AS (
    SELECT kind, key, inputs->role->>'kind' AS of_kind, inputs->role->>'key' AS of_key
    FROM (SELECT kind, key, inputs, '$."' || unnest(json_keys(inputs)) || '"' AS role FROM artifacts)
),
made AS (
    SELECT e.kind, e.key
    FROM edges e
    JOIN studies s ON e.of_kind = 'protocols' AND e.of_key = s.protocol
    WHERE s.study = $study
      AND e.kind IN ('studies', 'generations', 'finals', 'selections', 'winners', 'tests')
    UNION
    SELECT e.of_kind, e.of_key
    FROM made m
    JOIN edges e ON e.kind = m.kind AND e.key = m.key
)
SELECT kind, key, version, rows, bytes, sha256, seconds, created, provenance
FROM artifacts
JOIN made USING (kind, key)
ORDER BY created, kind, key
