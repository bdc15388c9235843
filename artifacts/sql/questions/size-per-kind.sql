-- What takes the space of the store?
-- Per kind of artifact: how many, rows, megabytes of data (10^6 bytes), share, and the largest one.
-- Activations and the baseline's logits grow with the model; trials hardly do. `tribunal store gc` frees what
-- nothing needs.
SELECT
    kind, count(*) AS artifacts, sum(rows)::BIGINT AS rows, round(sum(bytes) / 1e6, 2) AS megabytes,
    round(100 * sum(bytes) / sum(sum(bytes)) OVER (), 1) AS percent, round(max(bytes) / 1e6, 2) AS largest
FROM artifacts
GROUP BY kind
ORDER BY sum(bytes) DESC, kind
