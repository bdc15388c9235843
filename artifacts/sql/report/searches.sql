-- Every trial of a study plan's searches that passed the gates and was judged to its end, best first.
SELECT key, rank, arm, trial, n_harmful, refusals, overrefusals, kl
FROM stored_leaderboards
WHERE key IN $leaderboards AND split = 'search'
  AND NOT coalesce(gated, true) AND NOT coalesce(stopped, false) AND kl IS NOT NULL
ORDER BY key, rank
