"""The main path from Python: quantize, look at the numbers, load the checkpoint with stock transformers.

python examples/quantize_in_python.py OUTPUT
"""

import sys
from pathlib import Path

from transformers import AutoModelForSequenceClassification

import cptquant

result = cptquant.quantize_model(
    "embedded:bert-mini", "7bpw", Path(sys.argv[1]), calibration_sequences=16, eval_sequences=16, sequence_length=64
)
for name in ("accuracy", "kl_nats_per_example", "bits_per_weight"):
    for subject in ("original", "quantized", "uniform"):
        found = result.evaluation.find(name, subject)
        if found is not None:
            print(f"{name:22} {subject:10} {found.value:.4f} ± {found.stderr or 0:.4f} (n = {found.n})")

model = AutoModelForSequenceClassification.from_pretrained(result.checkpoint)
print(type(model).__name__, "loaded from", result.checkpoint.name)
