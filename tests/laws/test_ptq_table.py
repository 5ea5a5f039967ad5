"""The table of observations: exact round trips, and one clear message for each way it can be wrong."""

import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cptquant.core.errors import DataError, OutputError
from cptquant.laws.ptq import fit_ptq_law
from cptquant.laws.ptq_table import (
    COLUMNS,
    SHIPPED,
    append_observations,
    format_rows,
    read_observations,
    write_observations,
)
from laws.planted_ptq import made_features, planted_table


def test_round_trip_to_six_digits(tmp_path: Path):
    rows, path = planted_table(noise=0.1), tmp_path / "t.csv"
    write_observations(path, rows, ["made up"])
    again = read_observations(path)
    assert path.read_text().startswith("# made up\nmodel,family,plan,method,")
    write_observations(tmp_path / "u.csv", again, ["made up"])
    assert (tmp_path / "u.csv").read_text() == path.read_text()
    for first, second in zip(rows, again, strict=True):
        assert second.kl_nats == pytest.approx(first.kl_nats, rel=1e-5)
        assert second.model_dump(include={"model", "family", "plan"}) == first.model_dump(
            include={"model", "family", "plan"}
        )


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc", "Zl", "Zp")), min_size=1).filter(
        lambda text: text.strip() == text and not text.startswith("#") and text.splitlines() == [text]
    ),
    taylor=st.floats(1e-6, 10), slope=st.one_of(st.none(), st.floats(-1, 1)),
)  # fmt: skip
def test_any_row_comes_back(tmp_path: Path, name: str, taylor: float, slope: float | None):
    row = planted_table(families=1, plans=1)[0].model_copy(
        update={"model": name, "features": made_features(taylor=taylor, slope=slope)}
    )
    path = tmp_path / "t.csv"
    write_observations(path, [row])
    (again,) = read_observations(path)
    assert again.model == name
    assert again.features.taylor_kl_nats == pytest.approx(taylor, rel=1e-5)
    assert again.features.slope == (None if slope is None else pytest.approx(slope, rel=1e-5))


def test_append_makes_the_file_then_adds(tmp_path: Path):
    rows, path = planted_table(), tmp_path / "local.csv"
    append_observations(path, rows[:3])
    append_observations(path, rows[3:])
    write_observations(tmp_path / "whole.csv", rows)
    assert path.read_text() == (tmp_path / "whole.csv").read_text()
    fit = fit_ptq_law(path)
    assert fit.rows == len(rows) and fit.source == "local.csv"


def changed(path: Path, column: str, value: str) -> Path:
    write_observations(path, planted_table(families=1, plans=2))
    head, first, *rest = path.read_text().splitlines()
    cells = first.split(",")
    cells[COLUMNS.index(column)] = value
    path.write_text("\n".join([head, ",".join(cells), *rest]) + "\n")
    return path


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("kl_nats", "nan", "line 2: kl_nats is 'nan', expected a finite number; leave collapsed models out"),
        ("kl_nats", "-0.1", "line 2: kl_nats is -0.1, it must be above zero"),
        ("parameters", "0", "line 2: parameters is 0.0, it must be above zero"),
        ("nll_nats", "many", "line 2: nll_nats is 'many', expected a number"),
        ("rise_nats", "", "line 2: rise_nats is empty; only curvature, half_kl_nats"),
    ],
)
def test_bad_values_name_their_line(tmp_path: Path, column: str, value: str, message: str):
    with pytest.raises(DataError, match=message.replace("(", r"\(")):
        read_observations(changed(tmp_path / "t.csv", column, value))


def test_bad_files(tmp_path: Path):
    with pytest.raises(DataError, match=r"nowhere\.csv cannot be read"):
        read_observations(tmp_path / "nowhere.csv")
    (tmp_path / "empty.csv").write_text("# nothing\n")
    with pytest.raises(DataError, match=r"empty\.csv holds no rows; its header must name the columns model, family"):
        read_observations(tmp_path / "empty.csv")
    (tmp_path / "other.csv").write_text("N,D,loss\n1,2,3\n")
    with pytest.raises(DataError, match=r"other\.csv lacks the columns model, family, plan"):
        read_observations(tmp_path / "other.csv")
    with pytest.raises(DataError, match="lacks the columns"):
        append_observations(tmp_path / "other.csv", planted_table())
    with pytest.raises(OutputError, match="choose another --output"):
        append_observations(tmp_path / "no" / "such" / "t.csv", planted_table())


@pytest.mark.skipif(not SHIPPED.exists(), reason="no table yet: run runs/ptq_grid.sh")
def test_the_shipped_table_says_where_it_comes_from():
    lines = SHIPPED.read_text(encoding="utf-8").splitlines()
    comments = [line for line in lines if line.startswith("#")]
    assert "runs/ptq_grid.sh" in comments[0] and "torch" in comments[1]
    assert format_rows(read_observations(SHIPPED)) == "\n".join(lines[len(comments) + 1 :]) + "\n"


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("tokens_seen", "0", "tokens_seen is 0, expected 1 to 1e+17; remove or correct the row"),
        ("tokens_seen", "-3", "tokens_seen is -3, expected 1 to 1e+17"),
        ("method_ratio", "-1", "method_ratio is -1, expected 1e-09 to 1000"),
        ("method_ratio", "0", "method_ratio is 0, expected 1e-09 to 1000"),
        ("kl_nats", "1e300", "kl_nats is 1e+300, expected 0 to 1000"),
        ("kl_stderr_nats", "-1", "kl_stderr_nats is -1, expected 0 to 1000"),
        ("rise_stderr_nats", "-1", "rise_stderr_nats is -1, expected 0 to 1000"),
        ("output_error", "-5", "output_error is -5, expected 0 to 1e+06"),
        ("code_bits", "-3", "code_bits is -3, expected 1 to 32"),
        ("tokens", "-3", "tokens is -3, expected 1 to 1e+15"),
        ("tokens", "8.5", "tokens is 8.5, expected a whole number; correct the row"),
        ("taylor_kl_nats", "1e300", "taylor_kl_nats is 1e+300, expected 0 to 1e+06"),
        ("random_curvature", "1e300", "random_curvature is 1e+300, expected 1e-09 to 1e+09"),
        ("random_growth", "1e300", "random_growth is 1e+300, expected -100 to 100"),
        ("slope", "1e300", "slope is 1e+300, expected -1000 to 1000"),
        ("curvature", "-1e300", "curvature is -1e+300, expected -1e+06 to 1e+06"),
        ("sqnr_db", "1e300", "sqnr_db is 1e+300, expected -300 to 300"),
        ("parameters", "0.1", "parameters is 0.1, expected 1 to 1e+14"),
        ("rtn_kl_nats", "-1", "rtn_kl_nats is -1, expected -0.001 to 1000"),
        ("rtn_rise_nats", "1e300", "rtn_rise_nats is 1e+300, expected -1000 to 1000"),
        ("family", " ", "family is empty; name the family"),
        ("model", "", "model is empty; name the model"),
        ("method", "", "method is ''; choose one of: rtn, gptq, gptq + own text"),
        ("method", "awq", "method is 'awq'; choose one of: rtn, gptq, gptq + own text"),
        ("plan", "p0,extra", "has 28 cells, the header has 27; one row a line"),
        ("plan", '"a\nb"', "has 3 cells, the header has 27; one row a line"),
    ],
)
def test_values_no_measurement_has(tmp_path: Path, column: str, value: str, message: str):
    with pytest.raises(DataError, match=rf"t\.csv, line 2:? {re.escape(message)}"):
        read_observations(changed(tmp_path / "t.csv", column, value))


def test_a_column_told_twice(tmp_path: Path):
    (tmp_path / "t.csv").write_text(",".join([*COLUMNS, "kl_nats"]) + "\n")
    with pytest.raises(DataError, match=r"t\.csv has two columns called 'kl_nats'; rename one"):
        read_observations(tmp_path / "t.csv")


@pytest.mark.parametrize("comments", [(), ("made up",)])
def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path: Path, comments: tuple):
    rows, path = planted_table(families=1, plans=2), tmp_path / "t.csv"
    write_observations(path, rows, comments)
    plain = read_observations(path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_observations(path) == plain


def test_a_measurement_is_held_once(tmp_path: Path):
    rows, path = planted_table(families=2, plans=2, noise=0.1), tmp_path / "t.csv"
    assert append_observations(path, rows[:5]) == 5
    once = path.read_text()
    assert append_observations(path, rows[:5]) == 0
    assert path.read_text() == once
    assert append_observations(path, rows) == len(rows) - 5
    again = [rows[0].model_copy(update={"kl_nats": 2 * rows[0].kl_nats})]
    assert append_observations(path, again) == 1  # measured anew with another result: another row


def test_tokens_seen_that_contradict_the_table(tmp_path: Path):
    def seen(tokens: float | None):
        row = planted_table(families=1, plans=1)[0]
        return [row.model_copy(update={"features": row.features.model_copy(update={"tokens_seen": tokens})})]

    path = tmp_path / "t.csv"
    append_observations(path, seen(None))
    with pytest.raises(DataError, match=r"holds m0, p0, rtn already, with tokens_seen empty, not 1e\+09; correct that"):
        append_observations(path, seen(1e9))
    write_observations(path, seen(1e9))
    with pytest.raises(DataError, match=r"already, with tokens_seen 1e\+09, not 2e\+09; correct that column"):
        append_observations(path, seen(2e9))
    assert append_observations(path, seen(1e9)) == append_observations(path, seen(None)) == 0
