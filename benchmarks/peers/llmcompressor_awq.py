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
from pathlib import Path

from accounting import Account


def main() -> None:
    args = read_arguments()
    account = Account()
    with account.step("import"):
        import importlib.metadata

        import torch
        from llmcompressor import oneshot
        from safetensors.torch import load_file
        from transformers import AutoModelForCausalLM
    if args.threads:
        torch.set_num_threads(args.threads)
    if not torch.accelerator.is_available():
        torch.Tensor.pin_memory = lambda tensor, device=None: tensor
    with account.step("load"):
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
        input_ids = load_file(args.tokens)["input_ids"]
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in input_ids]
    batches = torch.utils.data.DataLoader(rows, batch_size=args.batch_size, shuffle=False)
    with account.step("quantize"):
        recipe = build_recipe(args, model.config.model_type)
        oneshot(model=model, dataset=batches, recipe=recipe, num_calibration_samples=len(rows))
    account.figures["recipe"] = {"duo_scaling": "both", "symmetric": False, "observer": args.observer,
                                 "then": "gptq" if args.then_gptq else "round to nearest"}  # fmt: skip
    with account.step("save"):
        model.save_pretrained(args.output, save_compressed=True)
    account.figures["versions"] = {
        name: importlib.metadata.version(name)
        for name in ("llmcompressor", "compressed-tensors", "transformers", "torch")
    }
    account.figures["threads"] = torch.get_num_threads()
    account.print_figures()


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens", type=Path, help="safetensors file with `input_ids` (n, T) int64")
    parser.add_argument("bits", type=int)
    parser.add_argument("group_size", type=int)
    parser.add_argument("output", type=Path)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--observer", default="minmax", help="minmax (its default) or mse")
    parser.add_argument("--then-gptq", action="store_true")
    parser.add_argument("--threads", type=int, default=None)
    return parser.parse_args()


def build_recipe(args: argparse.Namespace, model_type: str) -> list[object]:
    """Smoothing, then the rounding."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQMapping, AWQModifier

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


if __name__ == "__main__":
    main()
