-- The model, as it was probed.
WITH lineage AS (
$lineage)
SELECT m.architecture, m.dtype, m.quantization, m.n_layers, m.hidden_size, m.vocabulary, m.identity
FROM models m
WHERE m.key IN (SELECT key FROM lineage WHERE kind = 'models')
ORDER BY m.key
