-- Every prompt of the test split under the frozen trial, and the same prompt under each other model.
SELECT o.arm, e.class, e.prompt_id, e.refused AS refused, o.refused AS refused_other, e.kl, o.kl AS kl_other
FROM responses e
JOIN studies s ON s.study = e.study AND s.arm = e.arm
JOIN newest_prompts n ON n.protocol = s.protocol AND n.split = e.split AND n.prompts = e.prompts
JOIN responses o
    ON o.study = e.study AND o.split = e.split AND o.prompts = e.prompts AND o.arm <> e.arm
    AND o.class = e.class AND o.prompt_id = e.prompt_id
WHERE e.study = $study AND e.split = 'test' AND e.trial = $winner
ORDER BY o.arm <> 'unedited', o.arm, e.class, e.prompt_id
