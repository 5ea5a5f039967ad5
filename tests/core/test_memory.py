import pytest
from allocation.made_layouts import make_layout

from cptquant.core.errors import BudgetError, UserError
from cptquant.core.memory import find_need, memory_budget
from cptquant.core.settings import RunSettings

LAYOUT = make_layout([[(64, 64), (128, 64)]] * 3).model_copy(update={"key_value_width": 32, "max_positions": 512})


def test_the_cache_grows_with_the_context():
    short, long = find_need(LAYOUT, 16, "gguf"), find_need(LAYOUT, 32, "gguf")
    assert short.cache_bytes == 2 * 32 * 3 * 16  # float16, keys and values of 3 blocks
    assert long.cache_bytes == 2 * short.cache_bytes
    assert find_need(LAYOUT, None, "gguf").context == 512
    assert find_need(LAYOUT.model_copy(update={"task": "encoder"}), 16, "gguf").cache_bytes == 0


def test_what_is_left_is_the_budget():
    need = find_need(LAYOUT, 100, "gguf")
    budget = memory_budget(LAYOUT, "100MB", 100, "gguf")
    assert budget.limit_bytes(LAYOUT) == 100_000_000 - need.total_bytes
    assert budget.scope == "file"
    assert "100MB of memory less 19,200 bytes of keys and values at 100 tokens" in budget.text


@pytest.mark.parametrize(
    ("memory", "context", "message"),
    [
        ("1MB", 16, "--memory 1MB leaves nothing for the weights: "),
        ("4bpw", 16, "--memory '4bpw' is no size; write it as 2GB, 512MB or 1.5GiB"),
        ("much", 16, "--memory 'much' is not readable"),
        ("2GB", 513, "--context 513 is outside the model's range of 1 to 512 tokens"),
        ("2GB", 0, "--context 0 is outside the model's range of 1 to 512 tokens"),
    ],
)
def test_bad_limits(memory, context, message):
    with pytest.raises(BudgetError) as caught:
        memory_budget(LAYOUT, memory, context, "gguf")
    assert str(caught.value).startswith(message)


def test_unknown_sizes_are_named():
    with pytest.raises(BudgetError, match=r"--memory needs --context: config.json does not say how many positions"):
        find_need(LAYOUT.model_copy(update={"max_positions": None}), None, "gguf")
    with pytest.raises(BudgetError, match="does not say how wide keys and values are; use --budget"):
        find_need(LAYOUT.model_copy(update={"key_value_width": None}), 16, "gguf")


def test_budget_and_memory_exclude_each_other():
    both = RunSettings(model="m", budget="4bpw", memory="2GB")
    with pytest.raises(UserError, match="--budget and --memory were both given"):
        both.budget_for(LAYOUT)
    assert RunSettings(model="m", budget="4bpw").budget_for(LAYOUT).text == "4bpw"
