"""AWQ by llm-compressor on all linear layers of the blocks; run with the interpreter it is installed in.

    <peer python> benchmarks/peers/llmcompressor_awq.py MODEL TOKENS BITS GROUP_SIZE OUTPUT [--then-gptq]

Its documented recipe (examples/awq): asymmetric groups, scales searched with and without the weights' own size
("both"), then rounding to nearest, or with `--then-gptq` GPTQ on the smoothed model. Scaling is folded into the
preceding norm or layer, so norms in OUTPUT differ from the original's. OPT has no mapping of its own in version
0.14: its names are given here, q and k and v behind the norm before attention, out behind v, fc1 behind the last norm,
fc2 behind fc1 (exact, because ReLU commutes with positive scales).

Without an accelerator AWQ of version 0.14 stops when it pins cached activations ("Cannot access accelerator device when
none is available"); pinning, which changes no value, is left out here.
"""

import argparse
from typing import Any

from accounting import Account
from arguments import make_parser
from llmcompressor_run import PACKAGES, run_oneshot


def main() -> None:
    parser = make_parser(__doc__, bits=int, group_size=int)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--dtype", default="auto", help="auto: as the model is stored")
    parser.add_argument("--observer", default="minmax", help="minmax (its default) or mse")
    parser.add_argument("--then-gptq", action="store_true")
    args = parser.parse_args()
    account = Account()
    run_oneshot(args, account, "quantize", build_recipe)
    account.figures["recipe"] = {"duo_scaling": "both", "symmetric": False, "observer": args.observer,
                                 "then": "gptq" if args.then_gptq else "round to nearest"}  # fmt: skip
    account.finish(*PACKAGES)


def build_recipe(args: argparse.Namespace, model_type: str) -> list[Any]:
    """Smoothing, then the rounding."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQMapping, AWQModifier

    leave_out_pinning()
    weights = QuantizationArgs(
        num_bits=args.bits, type="int", symmetric=False, strategy="group", group_size=args.group_size,
        observer=args.observer,
    )  # fmt: skip
    rounding = {
        "config_groups": {"all": QuantizationScheme(targets=["Linear"], weights=weights)}, "ignore": ["lm_head"],
    }  # fmt: skip
    mappings = None
    if model_type == "opt":
        mappings = [
            AWQMapping("re:.*self_attn_layer_norm$", ["re:.*q_proj$", "re:.*k_proj$", "re:.*v_proj$"]),
            AWQMapping("re:.*v_proj$", ["re:.*out_proj$"]),
            AWQMapping("re:.*layers.*final_layer_norm$", ["re:.*fc1$"]),
            AWQMapping("re:.*fc1$", ["re:.*fc2$"]),
        ]
    smoothing = AWQModifier(mappings=mappings, duo_scaling="both")
    return [smoothing, (GPTQModifier if args.then_gptq else QuantizationModifier)(**rounding)]


def leave_out_pinning() -> None:
    """Where there is no accelerator to pin for."""
    import torch

    if not torch.accelerator.is_available():
        torch.Tensor.pin_memory = lambda tensor, device=None: tensor


if __name__ == "__main__":
    main()
