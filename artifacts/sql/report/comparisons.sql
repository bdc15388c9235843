-- Every comparison of `tribunal compare` with this study on either side, the newest first: a row per metric, with the
-- test that says whether A is better, tied or worse.
SELECT
    coalesce(study_a, '') || '/' || arm_a || coalesce('/' || trial_a, '') AS a,
    coalesce(study_b, '') || '/' || arm_b || coalesce('/' || trial_b, '') AS b,
    split, metric, n, difference, low, high, test, p_holm, verdict
FROM comparisons
WHERE study_a = $study OR study_b = $study
ORDER BY created DESC, key, metric = 'kl', metric = 'overrefusals'
