"""Nothing that is done with an adapter grows faster than the number of layers, for any method; and the benchmark's table."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

import vismt
from scripts.bench import scale
from scripts.benchmarks import section

DEPTHS = (2, 4, 8)


# Of three kinds of layers; then those with gates, with draws of layers and with a wrapper of the optimiser.
@pytest.mark.parametrize(
    "method",
    ["emtal", "lora", "s2ft", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ilora", "lisa", "polar"))],
)
def test_no_operation_grows_faster_than_the_number_of_layers(method: str) -> None:
    """Of a quadratic share the growth is 2: the limit finds one that makes a thirtieth of the calls at 4 layers."""
    depths = (DEPTHS[0], *DEPTHS)  # what is imported when it is first used comes before
    _, *counts = [scale.count_calls(lambda run, depth=depth: scale.operate(method, depth, run)) for depth in depths]
    rates = {name: scale.growth(DEPTHS, [count[name] for count in counts]) for name in counts[0]}
    assert {"adapt", "save", "load", "verify"} <= rates.keys()
    assert {name: rate for name, rate in rates.items() if rate > scale.FASTEST} == {}


def test_a_peft_folder_with_a_rank_and_a_whole_norm_for_each_layer_is_read_in_linear_time(tmp_path: Path) -> None:
    def read(depth: int) -> int:
        stock, folder = scale.model_of("lora", depth), tmp_path / str(depth)
        ranks = {f"layers.{layer}.self_attn.q_proj": 1 + layer % 3 for layer in range(depth)}
        model = copy.deepcopy(stock)
        vismt.adapt(model, "lora", targets=["q_proj"], rank_pattern=ranks, also_train=["input_layernorm"])
        vismt.export_peft(model, folder)
        counts = scale.count_calls(lambda run: run("import", lambda: vismt.import_peft(stock, folder)))
        return counts["import"]

    _, *counts = [read(depth) for depth in (DEPTHS[0], *DEPTHS)]
    assert scale.growth(DEPTHS, counts) < scale.FASTEST


@pytest.mark.slow
def test_evaluating_reporting_and_comparing_grow_with_the_number_of_examples() -> None:
    """The calls for each example; what is done once for a run is in the first size."""
    sizes = (50, 200, 800)
    result = scale.examples(1, sizes)
    (costs,) = result.costs.values()
    assert list(costs) == ["evaluate", "evaluate again", "report", "compare"]
    assert all(scale.growth(sizes, [cost.calls for cost in of]) <= 1.2 for of in costs.values())
    assert result.table[0] == ["", *costs] and "growth of calls per example of report" in str(result)


def test_the_page_has_the_table_of_every_method() -> None:
    costs = {"lora": [scale.Cost(0.1, 1000), scale.Cost(0.2, 2000), scale.Cost(0.4, 6000)]}
    result = scale.Scale("Cost", "layer", (1, 2, 4), {"lora": {"adapt": costs["lora"]}})
    (growth,) = result.comparisons()
    assert (growth.what, growth.name, growth.base, growth.ratio) == ("growth of calls per layer", "adapt", "lora", 2.0)
    entry = {"title": result.title, "note": result.note, "table": result.table, "comparisons": []}
    about = {"bench": "scale", "rounds": 1, "command": "", "date": "", "hardware": "", "versions": {}}
    assert "| lora | 0.4 s, 6 k, 2.00 |" in section({**about, "results": [entry]}).splitlines()
