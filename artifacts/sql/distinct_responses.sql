-- Every distinct response to each prompt of a study (first parameter), those of its unedited model
-- included, with what the prompt asked: what a judge is asked about, each once.
SELECT
    min(class) AS class, prompt_id, response_digest, any_value(prompt) AS prompt, any_value(response) AS response
FROM responses
WHERE study = $1
    OR (study IS NULL AND key IN (SELECT baseline FROM studies WHERE study = $1))
GROUP BY prompt_id, response_digest
ORDER BY prompt_id, response_digest
