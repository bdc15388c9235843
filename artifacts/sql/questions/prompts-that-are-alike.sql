-- Which prompts of different splits are nearly the same?
-- The most alike pairs across splits, by shared content words (Jaccard, 1: the same words). Exact copies
-- across splits are refused before a run; near ones are reported only, since templates make many. A test split
-- that looks like the search split measures memory of its prompts rather than what holds for new ones.
WITH texts AS (SELECT prompt_id, any_value(text) AS text FROM prompts GROUP BY prompt_id)
SELECT DISTINCT round(d.jaccard, 3) AS jaccard, d.set_a, d.set_b, a.text AS text_a, b.text AS text_b
FROM near_duplicates d
JOIN texts a ON a.prompt_id = d.prompt_a
JOIN texts b ON b.prompt_id = d.prompt_b
ORDER BY jaccard DESC, d.set_a, d.set_b, text_a, text_b
LIMIT 10
