"""GPTQ by GPTQModel on all linear layers of the blocks; run with the interpreter it is installed in.

    <peer python> benchmarks/peers/gptqmodel_gptq.py MODEL TOKENS BITS GROUP_SIZE OUTPUT

Counted as "gptq": the call of `quantize` on a loaded model (it packs as it goes), without saving.
OUTPUT receives the checkpoint as GPTQModel writes it; the ruler decodes it.

On two cores GPTQModel 7.7.0 stops while building its worker pool (a virtual pool wants two workers, the default for two
cores is one). GPTQMODEL_CPU_WORKERS=2, its own environment variable, is set here for that reason.
"""

import os

from accounting import Account
from arguments import read_gptq_arguments

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")


def main() -> None:
    args = read_gptq_arguments(__doc__, default_batch_size=1)
    account = Account()
    with account.step("import"):
        import torch
        from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
        from safetensors.torch import load_file
    if args.threads:
        torch.set_num_threads(args.threads)
    with account.step("load"):
        config = QuantizeConfig(
            bits=args.bits, group_size=args.group_size, sym=True, device="cpu", offload_to_disk=False,
            **({"mse": 2.4} if args.clip_search else {}),
        )  # fmt: skip
        kwargs = {} if args.dtype == "auto" else {"dtype": getattr(torch, args.dtype)}
        model = GPTQModel.load(args.model, config, **kwargs)
        input_ids = load_file(args.calibration)["input_ids"]
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in input_ids]
    with account.step("gptq"):
        model.quantize(rows, batch_size=args.batch_size, calibration_sort=None, backend=BACKEND.AUTO)
    account.figures["recipe"] = {
        "damp_percent": config.damp_percent, "desc_act": config.desc_act, "act_group_aware": config.act_group_aware,
    }  # fmt: skip
    with account.step("save"):
        model.save(str(args.output))
    account.figures["model_dtype"] = str(args.dtype)
    account.finish("gptqmodel", "transformers", "torch")


if __name__ == "__main__":
    main()
