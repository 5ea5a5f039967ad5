#!/bin/sh
# Make the table of observations from which the PTQ law is fitted (src/cptquant/laws/data/ptq_observations.csv).
#
#     runs/ptq_grid.sh                  # small models of our own, embedded:opt-mini
#     SHARED=../shared runs/ptq_grid.sh # and the two reference models with their text, where they are
#
# One thread, lowest priority but four; about 25 CPU minutes in all on an AMD EPYC (Zen 5). Models and plans that stand
# in $WORK are not made again, so a killed run goes on where it stopped. Set QUIET to a file that makes it wait.
set -eu
cd "$(dirname "$0")/.."
WORK=${WORK:-build/ptq_grid}
PYTHON=${PYTHON:-.venv/bin/python}
export OMP_NUM_THREADS=1

nice -n 15 "$PYTHON" runs/ptq_grid_models.py --output "$WORK/models"
for stage in last early; do
    for shape in opt-w64 opt-w128 llama-w64 llama-w128 llama-w192; do
        nice -n 15 "$PYTHON" runs/ptq_grid.py "$WORK/models/$shape-$stage" --family "$shape" --work "$WORK"
    done
done
nice -n 15 "$PYTHON" runs/ptq_grid.py embedded:opt-mini --family opt-mini --tokens-seen 8.35e6 --work "$WORK"
if [ -n "${SHARED:-}" ]; then
    for pair in llama:11.5e6 opt:12e6; do
        name=reference-${pair%%:*}
        nice -n 15 "$PYTHON" runs/ptq_grid.py "$SHARED/models/$name" --family "$name" --tokens-seen "${pair#*:}" \
            --calibration "$SHARED/data/text/general/train.txt" --eval-text "$SHARED/data/text/general/test.txt" \
            --work "$WORK"
    done
fi
"$PYTHON" runs/ptq_grid.py --collect src/cptquant/laws/data/ptq_observations.csv --work "$WORK"
