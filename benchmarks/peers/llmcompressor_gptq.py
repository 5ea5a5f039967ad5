"""GPTQ by llm-compressor on all linear layers of the blocks; run with the interpreter it is installed in.

    <peer python> benchmarks/peers/llmcompressor_gptq.py MODEL TOKENS BITS GROUP_SIZE OUTPUT

Counted as "gptq": the call of `oneshot` on a loaded model (graph tracing, calibration, quantization), without saving.
OUTPUT receives the checkpoint as llm-compressor writes it; the ruler decodes it.
"""

from accounting import Account
from arguments import read_arguments


def main() -> None:
    args = read_arguments(__doc__, default_batch_size=1)
    account = Account()
    with account.step("import"):
        import importlib.metadata

        import torch
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
        from llmcompressor import oneshot
        from llmcompressor.modifiers.gptq import GPTQModifier
        from safetensors.torch import load_file
        from transformers import AutoModelForCausalLM
    if args.threads:
        torch.set_num_threads(args.threads)
    with account.step("load"):
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype)
        input_ids = load_file(args.tokens)["input_ids"]
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in input_ids]
    batches = torch.utils.data.DataLoader(rows, batch_size=args.batch_size, shuffle=False)
    weights = QuantizationArgs(
        num_bits=args.bits, type="int", symmetric=True, strategy="group", group_size=args.group_size,
        observer="mse" if args.clip_search else "minmax",
    )  # fmt: skip
    recipe = GPTQModifier(
        config_groups={"all": QuantizationScheme(targets=["Linear"], weights=weights)}, ignore=["lm_head"]
    )
    with account.step("gptq"):
        oneshot(model=model, dataset=batches, recipe=recipe, num_calibration_samples=len(rows))
    account.figures["recipe"] = {"actorder": str(recipe.actorder), "dampening_frac": recipe.dampening_frac}
    with account.step("save"):
        model.save_pretrained(args.output, save_compressed=True)
    account.figures["versions"] = {
        name: importlib.metadata.version(name)
        for name in ("llmcompressor", "compressed-tensors", "transformers", "torch")
    }
    account.figures["threads"] = torch.get_num_threads()
    account.figures["model_dtype"] = str(model.dtype)
    account.print_figures()


if __name__ == "__main__":
    main()
