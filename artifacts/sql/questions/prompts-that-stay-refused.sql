-- Which harmful prompts stay refused whatever the edit?
-- Search split, the ten worst of each study: by how many of the trials that were heard to their end (and
-- passed the gates) each prompt is refused, and whether the frozen winner refuses it. A prompt that nearly all
-- of them refuse asks for a direction that the search does not have, or is a refusal by the labeller only:
-- read its responses.
SELECT
    x.study, count(*) FILTER (x.refused) AS refused_by, count(*) AS trials,
    bool_or(x.refused AND (x.study, x.trial) IN (SELECT (study, trial) FROM winners)) AS winner,
    any_value(x.prompt) AS prompt
FROM responses x
JOIN ranking r
    ON r.study = x.study AND r.split = x.split AND r.prompts = x.prompts AND r.arm = x.arm AND r.trial = x.trial
WHERE x.split = 'search' AND x.class = 'harmful' AND r.rank IS NOT NULL AND NOT r.gated
GROUP BY x.study, x.prompts, x.prompt_id
HAVING refused_by > 0
QUALIFY row_number() OVER (PARTITION BY x.study, x.prompts ORDER BY refused_by DESC, x.prompt_id) <= 10
ORDER BY x.study, refused_by DESC, x.prompt_id
