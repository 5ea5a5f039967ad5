#!/bin/sh
# Our own sweep: D-CPT law, held-out ratios and sizes, the two uses, and the joint plan, on the text in $SHARED.
#
#     SHARED=../shared runs/dcpt_sweep.sh
#
# One thread in this process (WORKERS=2: two workers of Ray); the sweep says beforehand what it will cost. A killed run
# goes on where it stopped. Results: $WORK/sweep (runs.csv, report.html), benchmarks/results/dcpt_on_own_runs.json, $WORK/plan-law.
set -eu
cd "$(dirname "$0")/.."
SHARED=$(cd "${SHARED:-../shared}" && pwd)
WORK=${WORK:-build/dcpt_sweep}
PYTHON=${PYTHON:-.venv/bin/python}
export OMP_NUM_THREADS=1

mkdir -p "$WORK"
# general/valid.txt is another style of text (WikiText-2, tokenised) than general/train.txt: every twelfth document of the
# latter is held out instead, so that the general loss is that of the text which is replayed.
awk -v RS= -v ORS='\n\n' -v held="$WORK/general-valid.txt" 'NR % 12 == 0 { print > held; next } { print }' \
    "$SHARED/data/text/general/train.txt" > "$WORK/general-train.txt"
sed -e "s|TEXT|$SHARED/data/text|g" -e "s|MODEL|$SHARED/models/reference-llama|" runs/dcpt_sweep.yaml > "$WORK/plan.yaml"
nice -n 10 "$PYTHON" -m cptquant sweep "$WORK/plan.yaml" --output "$WORK/sweep" --workers "${WORKERS:-0}" ${DRY:+--dry-run}
[ -n "${DRY:-}" ] && exit 0
nice -n 10 "$PYTHON" benchmarks/dcpt_on_own_runs.py "$WORK/sweep" --work "$WORK"
nice -n 10 "$PYTHON" -m cptquant plan "$WORK/sweep" --law-domain law --max-size 2MB --compute 40s \
    --max-general-increase 3% --output "$WORK/plan-law" --run --neighbours 3
