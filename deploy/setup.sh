#!/bin/sh
# What a Prefect server must know: work pool, deployments, automation. Run it again after an upgrade:
# the pool stays as it is, the rest becomes what the files say.
# Needs PREFECT_API_URL, and TRIBUNAL_ROOT: the folder of this checkout as the workers see it.
set -eu
cd "$(dirname "$0")/.."
prefect --no-prompt work-pool inspect tribunal >/dev/null 2>&1 ||
  prefect --no-prompt work-pool create tribunal --type process
prefect --no-prompt deploy --all
prefect --no-prompt automation delete "Crash silent runs" >/dev/null 2>&1 || true
prefect --no-prompt automation create --from-file deploy/automations.yaml
