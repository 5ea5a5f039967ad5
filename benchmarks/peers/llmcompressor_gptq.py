"""GPTQ by llm-compressor on all linear layers of the blocks; run with the interpreter it is installed in.

    <peer python> benchmarks/peers/llmcompressor_gptq.py MODEL TOKENS BITS GROUP_SIZE OUTPUT

Counted as "gptq": the call of `oneshot` on a loaded model (graph tracing, calibration, quantization), without saving.
OUTPUT receives the checkpoint as llm-compressor writes it; the ruler decodes it.
"""

import argparse
from typing import Any

from accounting import Account
from arguments import read_gptq_arguments
from llmcompressor_run import PACKAGES, run_oneshot


def main() -> None:
    args = read_gptq_arguments(__doc__, default_batch_size=1)
    account = Account()
    recipe = run_oneshot(args, account, "gptq", build_recipe)
    account.figures["recipe"] = {"actorder": str(recipe.actorder), "dampening_frac": recipe.dampening_frac}
    account.finish(*PACKAGES)


def build_recipe(args: argparse.Namespace, model_type: str) -> Any:
    """GPTQ with the tool's defaults, or with its clip search."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.gptq import GPTQModifier

    weights = QuantizationArgs(
        num_bits=args.bits, type="int", symmetric=True, strategy="group", group_size=args.group_size,
        observer="mse" if args.clip_search else "minmax",
    )  # fmt: skip
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    return GPTQModifier(config_groups={"all": scheme}, ignore=["lm_head"])


if __name__ == "__main__":
    main()
