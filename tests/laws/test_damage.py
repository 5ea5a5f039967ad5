"""What bits cost: planted laws are found again, and a dependence the data do not show is left out."""

from pathlib import Path

import numpy as np
import pytest

from cptquant.core.errors import DataError
from cptquant.laws.damage import DamageRow, damage_scatter, fit_damage, predict_damage, read_damages

C = {2: -1.0, 3: -2.6, 4: -4.0}


def planted(tokens_power: float = 0.0, share_slope: float = 0.0, noise: float = 0.02, seed: int = 0) -> list[DamageRow]:
    rng = np.random.default_rng(seed)
    rows: list[DamageRow] = []
    for size in (0.6e6, 1.5e6, 4e6):
        for ratio in (0.0, 0.25, 0.5, 0.75, 1.0):
            for tokens in (0.2e6, 0.6e6, 2e6):
                run = f"{size}-{ratio}"
                shared = 0.3 * noise * rng.standard_normal()
                for bits, c in C.items():
                    ln_kl = c - 0.3 * np.log(size / 1e6) + tokens_power * np.log(tokens / 1e6) + share_slope * ratio
                    kl = float(np.exp(ln_kl + shared + noise * rng.standard_normal()))
                    rise = 0.8 * kl * (1 + 0.05 * rng.standard_normal())
                    rows.append(DamageRow(run, size, tokens, ratio, bits, kl, rise, 0.05 * kl))
    return rows


@pytest.mark.parametrize(("power", "slope"), [(0.4, 0.0), (0.0, -0.5), (0.0, 0.0), (0.4, -0.5)])
def test_planted_parameters(power: float, slope: float) -> None:
    law = fit_damage(planted(power, slope), "law")
    assert law.size_power == pytest.approx(-0.3, abs=0.02)
    assert law.tokens_power == pytest.approx(power, abs=0.02)
    assert law.share_slope == pytest.approx(slope, abs=0.05)
    assert law.rise_per_kl == pytest.approx(0.8, abs=0.02)
    if power == 0:
        assert law.tokens_power == 0 and "tokens: left out, squared error of ln KL" in law.decided[0]
    else:
        assert law.decided[0].startswith("tokens: in, ")
    found = predict_damage(law, 3, 1.5e6, np.array([0.6e6]), np.array([0.5]))
    true = 0.8 * np.exp(C[3] - 0.3 * np.log(1.5) + power * np.log(0.6) + 0.5 * slope)
    assert found.shape == (201, 1) and found[0, 0] == pytest.approx(true, rel=0.05)
    assert 0.02 < damage_scatter(law) < 0.12


def test_one_number_of_tokens_decides_nothing() -> None:
    law = fit_damage([row for row in planted(0.4) if row.tokens == 0.6e6], "law")
    assert law.tokens_power == 0 and law.decided[0] == "tokens: left out, one value in all rows"


def test_refusals() -> None:
    rows = planted()
    with pytest.raises(DataError, match="3 quantized models of 1 runs are too few for a law of what bits cost"):
        fit_damage(rows[:3], "law")
    with pytest.raises(DataError, match="--bits 5: the sweep quantized to 2, 3, 4 bits; give those"):
        predict_damage(fit_damage(rows, "law"), 5, 1e6, np.array([1e6]), np.array([0.5]))


def test_the_table(tmp_path: Path) -> None:
    path = tmp_path / "ptq_runs.csv"
    names = "general_kl,general_rise,general_rise_stderr,domain_kl,domain_rise,domain_rise_stderr"
    path.write_text(f"# note\ndomain,run,N,D,r,bits,{names}\nlaw,a,1e6,2e5,0.5,3,.1,.09,.01,.2,.18,.01\n"
                    "code,b,1e6,2e5,0.5,3,.1,.09,.01,.2,.18,.01\n")  # fmt: skip
    rows = read_damages(path, "law", 1e6)
    assert rows["domain"] == [DamageRow("a", 1e6, 1.2e6, 0.5, 3, 0.2, 0.18, 0.01)] and len(rows["general"]) == 1
    path.write_text(f"domain,run,N,D,r,bits,{names}\nlaw,a,x,2e5,0.5,3,.1,.09,.01,.2,.18,.01\n")
    with pytest.raises(DataError, match=r"ptq_runs\.csv line 2: .* is missing or no number"):
        read_damages(path, "law")
