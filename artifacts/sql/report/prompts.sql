-- The prompt sets, by class and split.
WITH lineage AS (
$lineage)
SELECT p.class, p.split, count(*) AS prompts, p.key
FROM prompts p
WHERE p.key IN (SELECT key FROM lineage WHERE kind = 'prompts')
GROUP BY p.class, p.split, p.key
ORDER BY p.class = 'borderline', p.class = 'harmless', p.split = 'test', p.split = 'selection', p.split = 'search', p.key
