-- What do the trials of the Pareto front have in common?
-- Every trial of the search that no other beats in refusals, overrefusals and KL together, with its
-- parameters: where its direction comes from, and per component the peak weight, its layer and the reach in
-- layers. What all of them share is what matters; what scatters does not, or not yet.
SELECT
    study, trial, refusals, overrefusals AS over, round(kl, 5) AS kl,
    direction_scope AS scope, direction_method AS method, round(direction_index, 2) AS state,
    round(attn_o_proj_max_weight, 2) AS attn, round(attn_o_proj_max_weight_position, 1) AS attn_at,
    round(attn_o_proj_min_weight_distance, 1) AS attn_reach,
    round(mlp_down_proj_max_weight, 2) AS mlp, round(mlp_down_proj_max_weight_position, 1) AS mlp_at,
    round(mlp_down_proj_min_weight_distance, 1) AS mlp_reach
FROM pareto
WHERE split = 'search'
ORDER BY study, prompts, refusals, overrefusals, kl, trial
