-- What does the frozen winner still refuse, category by category?
-- Test split, the unedited model before and the winner after. Categories are columns of the prompts' source:
-- store them with `tribunal categories CONFIG --column NAME`; without, every prompt is in '(none)'. Most
-- categories are small: 0 of 8 still allows a rate of 37 % (95 %, Clopper-Pearson).
SELECT
    w.study, r.class, coalesce(c.category, '(none)') AS category,
    count(DISTINCT r.prompt_id) AS prompts,
    count(DISTINCT r.prompt_id) FILTER (r.arm = 'unedited' AND r.refused) AS before,
    count(DISTINCT r.prompt_id) FILTER (r.arm = w.arm AND r.refused) AS after
FROM winners w
JOIN responses r
    ON r.study = w.study AND r.split = 'test' AND r.prompts = w.prompts AND r.arm IN ('unedited', w.arm)
LEFT JOIN categories c ON c.class = r.class AND c.split = r.split AND c.prompt_id = r.prompt_id
GROUP BY w.study, r.class, c.source_column, c.category
ORDER BY w.study, r.class, after DESC, before DESC, prompts DESC, category
