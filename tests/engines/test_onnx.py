"""Every family's graph in ONNX Runtime against transformers' own model with our dequantized weights."""

import shutil

import numpy as np
import pytest
import torch
from engines_models.tiny_models import MODELS, quantize, save_model

from cptquant.core.errors import ArtifactError, BudgetError, EngineError, ModelError
from cptquant.models.load import load_model
from cptquant.models.stream import ModelStream
from cptquant.models.text import TokenSet

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.engines

MIXED = ["int4-g32", "int8-g32", "int2-g16", "int8-channel", "int4-g32-asym"]
CORRECTED = ("int2-g32-c5", "int4-g32-asym-c10")
LOW_RANK = ("int2-g32-r2", "int4-g32-asym-r3")
HALVES = ("slim3-g32-halves", "slim3-g32-sorted-halves")


def make_tokens(count: int = 3, length: int = 24) -> TokenSet:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 2048, (count, length), generator=generator)
    return TokenSet.build(ids, torch.ones_like(ids), None, torch.arange(count), "random")


def our_outputs(model, weights, tokens) -> torch.Tensor:
    stream = ModelStream(model, tokens, weights=weights, batch_size=tokens.sequence_count)
    for _ in range(model.layout.block_count):
        stream.advance(stream.load_block())
    return stream.finish(0, stream.hidden[0])


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """name -> (model, weights, model file, its float twin), made once."""
    from cptquant.exporters.onnx.export import export_onnx, write_float_twin

    made = {}

    def get(name: str, formats: tuple[str, ...] = tuple(MIXED)):
        if (name, formats) not in made:
            work = tmp_path_factory.mktemp(name)
            model = load_model(save_model(name, work / "model"))
            chosen, weights = quantize(model, list(formats))
            written = export_onnx(model, chosen, weights, work / "files")
            file = written.files[0]
            made[name, formats] = model, chosen, weights, written, file, write_float_twin(file)
        return made[name, formats]

    return get


def run(file, tokens) -> torch.Tensor:
    from cptquant.engines.onnx_runtime import OnnxRuntimeEngine

    engine = OnnxRuntimeEngine(file)
    if engine.task != "causal_lm":
        return torch.from_numpy(engine.encode(tokens.input_ids.numpy(), tokens.attention_mask.numpy()))
    outputs = []
    for row in tokens.input_ids.numpy():
        engine.reset()
        outputs.append(torch.from_numpy(engine.extend(row, every=True)))
    return torch.stack(outputs)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_float_activations_give_our_outputs(name, exported):
    model, _, weights, _, _, twin = exported(name)
    tokens = make_tokens()
    ours, theirs = our_outputs(model, weights, tokens), run(twin, tokens)
    assert theirs.shape == ours.shape
    assert (theirs - ours).abs().max() < 2e-4 * ours.abs().max()


def check_matrices(exported, name, formats, storage) -> tuple[int, list[int]]:
    """Outputs, legality, bytes and matrices read back; (sites of that storage, bits of every MatMulNBits)."""
    from cptquant.core.targets import find_target
    from cptquant.exporters.onnx.read_back import read_sites

    model, chosen, weights, written, file, twin = exported(name, formats)
    tokens = make_tokens()
    ours, theirs = our_outputs(model, weights, tokens), run(twin, tokens)
    assert (theirs - ours).abs().max() < 2e-4 * ours.abs().max()
    target, sites = find_target("onnx"), model.layout.site_by_name
    special = [site for site, fmt in chosen.items() if fmt.storage == storage]
    assert all(target.refusal(sites[site], chosen[site]) is None for site in special)
    assert written.tensor_bytes == target.plan_bytes(model.layout, chosen)
    for site, matrix in read_sites(file, model.layout, chosen):
        assert torch.equal(matrix, weights.weight(site)), site
    return len(special), [
        attribute.i for node in onnx.load_model(file, load_external_data=False).graph.node
        for attribute in node.attribute if node.op_type == "MatMulNBits" and attribute.name == "bits"
    ]  # fmt: skip


@pytest.mark.parametrize("name", sorted(MODELS))
def test_two_widths_in_a_matrix(name, exported):
    """Groups of 2 and of 4 bits are two products."""
    mixed, widths = check_matrices(exported, name, HALVES, "segments")
    assert mixed >= 6 and widths.count(2) == mixed


@pytest.mark.parametrize("name", sorted(MODELS))
def test_corrected_columns(name, exported):
    """A float product beside that of the codes."""
    corrected, _ = check_matrices(exported, name, CORRECTED, "columns")
    assert corrected >= 8


@pytest.mark.parametrize("name", sorted(MODELS))
def test_products_of_low_rank(name, exported):
    """Two thin float products beside that of the codes."""
    corrected, _ = check_matrices(exported, name, LOW_RANK, "low-rank")
    assert corrected >= 8


@pytest.mark.parametrize(
    ("formats", "part", "said"),
    [
        (("slim3-g32-halves",), ".numbers", r"numbers are not each of 0 to \d+ once"),
        (("slim3-g32-sorted-halves",), ".numbers", r"numbers are not each of 0 to \d+ once"),
        (("int4-g32-c10",), ".correction.columns", r"ascending"),
    ],
)
def test_damaged_numbers_of_columns_are_named(formats, part, said, exported, tmp_path):
    from cptquant.exporters.onnx.read_back import read_sites

    model, chosen, _, written, file, _ = exported("opt", formats)
    for path in written.folder.glob("model.onnx*"):
        shutil.copyfile(path, tmp_path / path.name)
    tensor = next(t for t in onnx.load_model(file, load_external_data=False).graph.initializer if t.name.endswith(part))
    where = {entry.key: entry.value for entry in tensor.external_data}
    data = bytearray((tmp_path / where["location"]).read_bytes())
    start = int(where["offset"])
    data[start : start + int(where["length"])] = bytes(int(where["length"]))
    (tmp_path / where["location"]).write_bytes(data)
    with pytest.raises(ArtifactError, match=rf"model.onnx is damaged at .*{said}.*; write it again with: cptquant"):
        dict(read_sites(tmp_path / "model.onnx", model.layout, chosen))


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_matrices_of_one_input_with_the_same_halves_are_one_product(name, tmp_path):
    from cptquant.core.formats import QuantFormat
    from cptquant.exporters.onnx.export import export_onnx, write_float_twin
    from cptquant.exporters.onnx.read_back import read_sites
    from cptquant.models.checkpoint_weights import MemoryWeights
    from cptquant.quantizers.rtn import Rtn

    model = load_model(save_model(name, tmp_path / "model"))
    formats, weights = quantize(model, ["int4-g32"])
    fmt, state, found = QuantFormat.parse("slim3-g32-sorted-halves"), model.module.state_dict(), {}
    for block in range(model.layout.block_count):
        sites = [site for site in model.layout.sites if site.block_index == block]
        for roles in (("q", "k", "v"), ("qkv",), ("gate", "up")):
            together = [site for site in sites if site.role in roles]
            if together:
                whole = Rtn()(torch.cat([state[site.parameter_name].float() for site in together]), fmt, torch.bfloat16)
                start = 0
                for site in together:
                    formats[site.name], found[site.name] = fmt, whole.rows(slice(start, start + site.out_features))
                    start += site.out_features
    weights = MemoryWeights({**{s.name: weights.quantized(s.name) for s in model.layout.sites if
                                weights.quantized(s.name) is not None}, **found})  # fmt: skip
    file = export_onnx(model, formats, weights, tmp_path / "files").files[0]
    tokens = make_tokens()
    ours, theirs = our_outputs(model, weights, tokens), run(write_float_twin(file), tokens)
    assert (theirs - ours).abs().max() < 2e-4 * ours.abs().max()
    for site, matrix in read_sites(file, model.layout, formats):
        assert torch.equal(matrix, weights.weight(site)), site
    graph = onnx.load_model(file, load_external_data=False).graph
    names = sorted(tensor.name for tensor in graph.initializer if tensor.name.endswith(".numbers"))
    assert len(names) == 2 * 2
    if name == "llama":
        path = "model.layers.0.self_attn."
        assert f"{path}q_proj+{path}k_proj+{path}v_proj.numbers" in names


@pytest.mark.parametrize("name", ["bert-encoder", "bert-classifier"])
def test_one_scale_a_row_in_encoders(name, exported):
    """DynamicQuantizeMatMul, with a few columns apart where activations have outliers."""
    model, _, weights, _, file, twin = exported(name, ("int8-channel",))
    tokens = make_tokens()
    ours, exact, rounded = our_outputs(model, weights, tokens), run(twin, tokens), run(file, tokens)
    assert (exact - ours).abs().max() < 2e-4 * ours.abs().max()
    assert 0 < (rounded - ours).abs().max() < 0.1 * ours.abs().max()
    kinds = [node.op_type for node in onnx.load_model(file, load_external_data=False).graph.node]
    assert kinds.count("TopK") == 2 * 3  # the inputs of q, k, v (one), of up and of down, in two blocks


@pytest.mark.parametrize("apart", [0, 2, 8])
def test_columns_apart_keep_the_others_digits(tmp_path, apart):
    """Two columns 200 times as large as the rest: taken out, the rest is rounded to its own 8 bits."""
    import onnxruntime
    from onnx import TensorProto

    from cptquant.core.formats import QuantFormat
    from cptquant.exporters.onnx.graph import GraphBuilder
    from cptquant.packing.quantized_weight import QuantizedWeight
    from cptquant.quantizers.rtn import Rtn

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 48, generator=generator)
    x[..., [7, 30]] *= 200
    matrix = torch.randn(24, 48, generator=generator)
    matrix[:, [7, 30]] /= 200
    weight = Rtn(clip_search=False)(matrix, QuantFormat.parse("int8-channel"), torch.float16)
    assert isinstance(weight, QuantizedWeight)
    with open(tmp_path / "m.data", "wb") as data:
        graph = GraphBuilder(data, "m.data", torch.float16)
        product = graph.row_product(
            graph.input("x", TensorProto.FLOAT, ["batch", "tokens", 48]), "w", weight, apart=apart
        )
        graph.output(product, "y", TensorProto.FLOAT, ["batch", "tokens", 24])
        onnx.save_model(graph.model({}), tmp_path / "m.onnx")
    found = torch.from_numpy(onnxruntime.InferenceSession(tmp_path / "m.onnx").run(None, {"x": x.numpy()})[0])
    exact = x @ weight.dequantize().T
    error = ((found - exact).norm() / exact.norm()).item()
    assert found.shape == (2, 5, 24)
    assert error < 0.01 if apart else error > 0.2


@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_matrix_reads_back_and_bytes_are_counted(name, exported):
    from cptquant.core.targets import find_target
    from cptquant.exporters.onnx.read_back import read_sites

    model, formats, weights, written, file, _ = exported(name)
    found = dict(read_sites(file, model.layout, formats))
    assert set(found) == {site for site, fmt in formats.items() if not fmt.is_float}
    for site, matrix in found.items():
        assert torch.equal(matrix, weights.weight(site)), site
    counted = find_target("onnx").plan_bytes(model.layout, formats)
    assert written.tensor_bytes == counted


@pytest.mark.parametrize("name", ["opt", "qwen3", "gpt_neox"])
def test_the_cache_changes_nothing(name, exported):
    from cptquant.engines.onnx_runtime import OnnxRuntimeEngine

    *_, twin = exported(name)
    ids = make_tokens(1, 40).input_ids[0].numpy()
    engine = OnnxRuntimeEngine(twin, context=40)
    whole = engine.extend(ids, every=True)
    engine.reset()
    pieces = [engine.extend(ids[:15], every=True)]
    pieces += [engine.extend(ids[index : index + 1]) for index in range(15, 20)]
    pieces.append(engine.extend(ids[20:], every=True))
    np.testing.assert_allclose(np.concatenate(pieces), whole, atol=1e-4)
    with pytest.raises(EngineError, match=r"^41 tokens do not fit the context of 40$"):
        engine.extend(ids[:1])


def test_sixteen_bits_stay_exact_and_shared(exported):
    model, _, weights, written, _, twin = exported("qwen2", ("bfloat16",))
    assert written.tensor_bytes == model.layout.bytes_at_16_bit
    tokens = make_tokens()
    ours = our_outputs(model, weights, tokens)
    assert (run(twin, tokens) - ours).abs().max() < 2e-4 * ours.abs().max()


def test_padding_is_masked(exported):
    *_, twin = exported("bert-encoder")
    from cptquant.engines.onnx_runtime import OnnxRuntimeEngine

    engine, ids = OnnxRuntimeEngine(twin), make_tokens(1, 20).input_ids.numpy()
    padded, mask = np.pad(ids, ((0, 0), (0, 7))), np.pad(np.ones_like(ids), ((0, 0), (0, 7)))
    np.testing.assert_allclose(engine.encode(padded, mask)[:, :20], engine.encode(ids, np.ones_like(ids)), atol=1e-5)


def test_int8_activations_stay_near(exported):
    model, _, weights, _, file, _ = exported("llama", ("int8-g32",))
    tokens = make_tokens()
    ours, theirs = our_outputs(model, weights, tokens).log_softmax(-1), run(file, tokens).log_softmax(-1)
    kl = (ours.exp() * (ours - theirs)).sum(-1).mean()
    assert 0 < kl < 1e-3


def test_damaged_and_foreign_files_are_refused(exported, tmp_path):
    from cptquant.engines.onnx_runtime import OnnxRuntimeEngine

    *_, written, file, _ = exported("opt")
    for path in written.folder.glob("model.onnx*"):
        shutil.copyfile(path, tmp_path / path.name)
    data = tmp_path / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-5000])
    with pytest.raises(EngineError, match=r"cannot load .*model.onnx .* is the file whole\? Write it again with: cpt"):
        OnnxRuntimeEngine(tmp_path / "model.onnx")
    (tmp_path / "model.onnx").write_bytes(b"not a model")
    with pytest.raises(EngineError, match="is the file whole"):
        OnnxRuntimeEngine(tmp_path / "model.onnx")
    with pytest.raises(EngineError, match=r"^--context 100 is longer than the 64 positions .* was written for$"):
        OnnxRuntimeEngine(file, context=100)


def test_what_the_graph_does_not_know_is_refused(tmp_path):
    from cptquant.exporters.onnx.export import export_onnx

    model = load_model(save_model("opt", tmp_path / "model"))
    formats, weights = quantize(model, ["int8-g32"])
    with pytest.raises(BudgetError, match=r"^--context 65 is outside the model's range of 2 to 64 tokens"):
        export_onnx(model, formats, weights, tmp_path / "files", context=65)
    model.module.config.activation_function = "mish"
    with pytest.raises(ModelError, match=r"does not know the activation 'mish' of OPTForCausalLM; it knows relu, silu"):
        export_onnx(model, formats, weights, tmp_path / "files")
    assert not (tmp_path / "files").exists()
