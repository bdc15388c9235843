-- The study: its config, and what decided its search.
SELECT study, name, model, protocol, arm, seed, dtype, labeller, max_new_tokens, generation_size, config
FROM studies
WHERE study = $study
