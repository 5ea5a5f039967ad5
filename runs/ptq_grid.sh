#!/bin/sh
# Make the table of observations from which the PTQ law is fitted (src/cptquant/laws/data/ptq_observations.csv).
#
#     runs/ptq_grid.sh                  # small models of our own, embedded:opt-mini
#     SHARED=../shared runs/ptq_grid.sh # and the two reference models with their text, where they are
#
# One thread, lowest priority but four; about 25 CPU minutes in all on an AMD EPYC (Zen 5). Models and plans that stand
# in $WORK are not made again, so a killed run goes on where it stopped. Set QUIET to a file that makes it wait,
# GRID=--core to measure only the formats that matter most, METHOD="gptq + own text" to quantize in one way only; rows of
# the table that are not made again stay.
set -eu
cd "$(dirname "$0")/.."
WORK=${WORK:-build/ptq_grid}
PYTHON=${PYTHON:-.venv/bin/python}
export OMP_NUM_THREADS=1

nice -n 15 "$PYTHON" runs/ptq_grid_models.py --output "$WORK/models"
set -- embedded:opt-mini
for name in llama-w64-last opt-w128-last llama-w192-last opt-w64-last llama-w128-last llama-w128-early \
    llama-w192-early opt-w128-early; do
    set -- "$@" "$WORK/models/$name"
done
nice -n 15 "$PYTHON" runs/ptq_grid.py "$@" ${GRID:-} ${METHOD:+--methods "$METHOD"} --work "$WORK"
if [ -n "${SHARED:-}" ]; then
    nice -n 15 "$PYTHON" runs/ptq_grid.py "$SHARED/models/reference-llama" "$SHARED/models/reference-opt" ${GRID:-} \
        ${METHOD:+--methods "$METHOD"} --calibration "$SHARED/data/text/general/train.txt" \
        --eval-text "$SHARED/data/text/general/test.txt" --work "$WORK"
fi
nice -n 15 "$PYTHON" runs/ptq_grid.py --collect src/cptquant/laws/data/ptq_observations.csv ${METHOD:+--methods "$METHOD"} \
    --work "$WORK"
