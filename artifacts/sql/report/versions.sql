-- With which versions, and on what device, the artifacts were made.
WITH lineage AS (
$lineage)
SELECT
    provenance->>'tribunal' AS tribunal, provenance->>'python' AS python, provenance->>'torch' AS torch,
    provenance->>'transformers' AS transformers, provenance->>'device' AS device,
    count(*) AS artifacts, min(created) AS first, max(created) AS last
FROM lineage
GROUP BY ALL
ORDER BY first, tribunal, python, torch, transformers, device
