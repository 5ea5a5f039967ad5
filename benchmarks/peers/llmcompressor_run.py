"""One call of llm-compressor's `oneshot`, shared by its scripts; imported under its own interpreter."""

import argparse
from collections.abc import Callable
from typing import Any

from accounting import Account

PACKAGES = ("llmcompressor", "compressed-tensors", "transformers", "torch")


def run_oneshot(
    args: argparse.Namespace, account: Account, step: str, build_recipe: Callable[[argparse.Namespace, str], Any]
) -> Any:
    """Load, calibrate and quantize (counted as `step`), save; returns the recipe that `build_recipe` made.

    Args:
        build_recipe: from the arguments and the model's type; called before `step`, so that its imports do not count.
    """
    with account.step("import"):
        import torch
        from llmcompressor import oneshot
        from safetensors.torch import load_file
        from transformers import AutoModelForCausalLM
    if args.threads:
        torch.set_num_threads(args.threads)
    with account.step("load"):
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype)
        input_ids = load_file(args.calibration)["input_ids"]
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in input_ids]
    batches = torch.utils.data.DataLoader(rows, batch_size=args.batch_size, shuffle=False)
    recipe = build_recipe(args, model.config.model_type)
    with account.step(step):
        oneshot(model=model, dataset=batches, recipe=recipe, num_calibration_samples=len(rows))
    account.figures["model_dtype"] = str(model.dtype)
    with account.step("save"):
        model.save_pretrained(args.output, save_compressed=True)
    return recipe
