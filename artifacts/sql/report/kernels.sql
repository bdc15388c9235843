-- The frozen trial and the search split's Pareto front: what each of them changes, and where.
SELECT
    t.trial, t.trial = $winner AS frozen, t.refusals, t.overrefusals, t.kl,
    t.direction_scope, t.direction_index, t.direction_method, t.direction_blend,
    t.attn_o_proj_max_weight, t.attn_o_proj_max_weight_position,
    t.attn_o_proj_min_weight, t.attn_o_proj_min_weight_distance,
    t.mlp_down_proj_max_weight, t.mlp_down_proj_max_weight_position,
    t.mlp_down_proj_min_weight, t.mlp_down_proj_min_weight_distance
FROM trials t
JOIN studies s ON s.study = t.study AND s.arm = t.arm
JOIN newest_prompts n ON n.protocol = t.protocol AND n.split = t.split AND n.prompts = t.prompts
LEFT JOIN pareto p
    ON p.study = t.study AND p.split = t.split AND p.prompts = t.prompts AND p.arm = t.arm AND p.trial = t.trial
WHERE t.study = $study AND t.split = 'search' AND (p.trial IS NOT NULL OR t.trial = $winner)
ORDER BY frozen DESC, t.refusals, t.overrefusals, t.kl, t.trial
LIMIT $limit
