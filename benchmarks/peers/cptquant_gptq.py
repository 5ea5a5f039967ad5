"""GPTQ by cptquant on all linear layers of the blocks, under the same command line as the peers' scripts.

    python benchmarks/peers/cptquant_gptq.py MODEL TOKENS BITS GROUP_SIZE OUTPUT

Counted as "gptq": `quantize_sites` on a loaded model, encoding and writing of each finished block included.
"""

import tempfile
from dataclasses import replace
from pathlib import Path

from accounting import Account
from arguments import read_gptq_arguments


def main() -> None:
    args = read_gptq_arguments(__doc__, default_batch_size=None)
    account = Account()
    with account.step("import"):
        import torch
        from safetensors.torch import load_file

        from cptquant.allocation.allocate import allocate
        from cptquant.allocation.uniform import Uniform
        from cptquant.core.budget import Budget
        from cptquant.core.formats import QuantFormat
        from cptquant.core.provenance import installed_versions
        from cptquant.core.targets import find_target
        from cptquant.exporters.compressed_tensors import write_checkpoint
        from cptquant.models.load import load_model
        from cptquant.models.text import TokenSet
        from cptquant.packing.shards import ShardFolder
        from cptquant.quantizers.gptq import Gptq
        from cptquant.quantizers.quantize import quantize_sites
        from cptquant.stages.quantize import block_label
    if args.dtype != "auto":
        raise SystemExit("cptquant holds a model in its own dtype and computes in float32; --dtype is for the peers")
    if args.batch_size is not None:
        raise SystemExit("cptquant chooses its batch size by itself; --batch-size is for the peers")
    if args.threads:
        torch.set_num_threads(args.threads)
    with account.step("load"):
        model = load_model(args.model)
        input_ids = load_file(args.calibration)["input_ids"]
    tokens = TokenSet.build(
        input_ids, torch.ones_like(input_ids), None, torch.arange(len(input_ids)), "tokens of the benchmark"
    )
    wanted = QuantFormat(code_bits=args.bits, granularity=args.group_size)
    roomy = Budget.parse(f"{args.bits + 4}bpw@sites")
    plan = allocate(model.layout, None, roomy, find_target("transformers"), Uniform(), formats=[wanted])
    shapes = {site.name: (site.out_features, site.in_features) for site in model.layout.sites}
    quantizer = Gptq(activation_order=args.activation_order)
    if args.clip_search is not None:
        quantizer = replace(quantizer, clip_search=args.clip_search)
    if args.descent_rounds is not None:
        quantizer = replace(quantizer, descent_rounds=args.descent_rounds)
    with tempfile.TemporaryDirectory() as work:
        shards = ShardFolder(Path(work), plan.quant_formats, shapes)
        with account.step("gptq"):
            quantize_sites(
                model, plan, quantizer, tokens,
                lambda index, weights, records: shards.save(block_label(index), weights, records),
            )  # fmt: skip
        with account.step("save"):
            write_checkpoint(model, plan, shards, args.output)
        outcomes = [record.outcome.value for record in shards.records()]
    account.figures |= {
        "recipe": repr(quantizer),
        "outcomes": {outcome: outcomes.count(outcome) for outcome in sorted(set(outcomes))},
        "versions": installed_versions(),
        "threads": torch.get_num_threads(),
        "model_dtype": model.layout.source_dtype,
    }
    account.print_figures()


if __name__ == "__main__":
    main()
