-- Which layers do winners edit, and how strongly?
-- Per model and layer: how many frozen winners edit it, and their mean weight there (0 where they do not; 1
-- removes the direction). The weight falls linearly from its peak to the edge of its kernel, and is 0 beyond.
-- One winner proves no pattern: other trials of the front may edit other layers (parameters-of-the-front).
WITH winner AS (
    SELECT w.*, s.model, m.n_layers
    FROM winners w
    JOIN studies s ON s.study = w.study
    JOIN artifacts a ON a.kind = 'protocols' AND a.key = w.protocol
    JOIN models m ON m.key = json_extract_string(a.inputs, '$."materials.model".key')
),
kernels AS (
    SELECT
        model, n_layers, 'attn' AS component, attn_o_proj_max_weight AS peak, attn_o_proj_max_weight_position AS place,
        attn_o_proj_min_weight AS edge, attn_o_proj_min_weight_distance AS reach
    FROM winner
    UNION ALL
    SELECT
        model, n_layers, 'mlp', mlp_down_proj_max_weight, mlp_down_proj_max_weight_position,
        mlp_down_proj_min_weight, mlp_down_proj_min_weight_distance
    FROM winner
),
layers AS (SELECT *, unnest(range(n_layers)) AS layer FROM kernels),
weights AS (
    SELECT
        *,
        CASE
            WHEN abs(layer - place) > reach THEN 0
            WHEN layer = place THEN peak
            ELSE peak * (1 + abs(layer - place) / reach * (edge - 1))
        END AS weight
    FROM layers
)
SELECT
    model, layer,
    count(*) FILTER (component = 'attn') AS winners,
    count(*) FILTER (component = 'attn' AND weight > 0) AS edit_attn,
    round(avg(weight) FILTER (component = 'attn'), 3) AS attn_weight,
    count(*) FILTER (component = 'mlp' AND weight > 0) AS edit_mlp,
    round(avg(weight) FILTER (component = 'mlp'), 3) AS mlp_weight
FROM weights
GROUP BY model, layer
ORDER BY model, layer
