-- How well the direction of every residual state separates harmful from harmless prompts.
SELECT d.state, d.cosine, d.silhouette, d.harmful_norm, d.harmless_norm, d.difference_norm
FROM directions d
WHERE d.role = 'mean'
  AND d.key = (SELECT max(t.directions) FROM trials t WHERE t.study = $study AND t.split = 'search')
ORDER BY d.state
