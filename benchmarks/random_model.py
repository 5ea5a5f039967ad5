"""Write a model of a given configuration with random bf16 weights, and the tokenizer of embedded:opt-mini.

    python benchmarks/random_model.py FOLDER '{"model_type": "opt", ...}'

A process of its own, so that its memory is not counted in what is measured afterwards.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from results_file import model_folder
from transformers import AutoConfig, AutoModelForCausalLM


def main() -> None:
    folder, fields = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.manual_seed(0)
    config = AutoConfig.for_model(fields.pop("model_type"), dtype="bfloat16", **fields)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(model_folder("embedded:opt-mini") / name, folder / name)


if __name__ == "__main__":
    main()
