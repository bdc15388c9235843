-- What the unedited model and one trial answer to the same prompts. Per class, first those whose label changed.
SELECT
    e.class, e.prompt_id, e.prompt, b.refused AS refused_before, e.refused AS refused_after,
    b.response AS before, e.response AS after, e.ended AS after_ended, e.degenerate, e.kl,
    count(*) OVER (PARTITION BY e.class) AS of_class
FROM responses e
JOIN studies s ON s.study = e.study AND s.arm = e.arm
JOIN newest_prompts n ON n.protocol = s.protocol AND n.split = e.split AND n.prompts = e.prompts
JOIN responses b
    ON b.arm = 'unedited' AND b.split = e.split AND b.class = e.class AND b.prompt_id = e.prompt_id
    AND (b.key = s.baseline OR (b.study = e.study AND b.prompts = e.prompts))
WHERE e.study = $study AND e.split = $split AND e.trial = $trial
QUALIFY row_number() OVER (
    PARTITION BY e.class
    ORDER BY b.refused = e.refused, b.response = e.response, e.prompt_id
) <= $limit
ORDER BY e.class = 'borderline', e.class = 'harmless', refused_before = refused_after, before = after, e.prompt_id
