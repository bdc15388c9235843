-- Every artifact that the members of a study plan were made from, each once, whoever needed it.
SELECT kind, key, version, rows, bytes, sha256, seconds, created, provenance
FROM artifacts
WHERE key IN $keys
ORDER BY created, kind, key
