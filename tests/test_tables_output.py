"""A table's numbers, files and charts, against what is worked out by hand or another way."""

import csv
import itertools
import math
import random
import re
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from auxilearn.errors import UserError, needs
from auxilearn.tables import chart, render
from auxilearn.tables.chart import apart, draw_table, looks
from auxilearn.tables.protocol import (
    ABLATION,
    BASELINE,
    DATASETS,
    SCHEDULE,
    TABLES,
    TARGET_ONLY,
    rows,
)
from auxilearn.tables.render import PAPER_HEADER, Sheet, read_paper
from auxilearn.tables.statistics import evaluate, holm
from auxilearn.tables.sweep import Result

ROWS = rows()
SEEDS = (1, 2, 3, 4)
HEADER = ",".join(PAPER_HEADER) + "\n"
ABLATIONS = [row for row in ROWS if ROWS[row].kind == ABLATION]
# Means 0.5, 0.6, 0.7 and 0.75; deviations from them chosen by hand.
VALUES = {
    "single": (0.50, 0.52, 0.48, 0.50),
    "common": (0.60, 0.62, 0.58, 0.60),
    "naive": (0.58, 0.63, 0.59, 0.62),
    "joint": (0.70, 0.71, 0.69, 0.70),
}


def cell(row, setting, values, seeds=SEEDS):
    """Results of a cell; None in the place of a value is a failed run."""
    return [
        Result(
            row,
            setting,
            seed,
            "failed" if value is None else "done",
            value,
            None if value is None else 0.5,
            f"id{row}{seed}",
            f"runs/{row}-{setting}-{seed}",
            f"python train_bilevel.py --seed {seed}",
        )
        for seed, value in zip(seeds, values, strict=True)
    ]


def table(values, setting="supervised", seeds=SEEDS):
    return [r for row, of_row in values.items() for r in cell(row, setting, of_row, seeds)]


def sheet(name, dataset, results, seeds=SEEDS, paper=None, notes=()):
    """The table of ``results`` as it is printed."""
    found = evaluate(name, results, seeds)
    return Sheet(found, dataset, DATASETS[dataset].title, paper, tuple(notes))


def markdown(*args, **more):
    return render.markdown(sheet(*args, **more))


def write_table(*args, out, **more):
    return render.write_table(sheet(*args, **more), out)


def table_figure(name, results, dataset, clean=None):
    return chart.table_figure(sheet(name, dataset, results), clean)


def two_sided_p(differences):
    """Paired t-test by integrating Student's density numerically, tail included by symmetry."""
    n = len(differences)
    centre = sum(differences) / n
    sd = math.sqrt(sum((d - centre) ** 2 for d in differences) / (n - 1))
    t, freedom = abs(centre) / (sd / math.sqrt(n)), n - 1
    # With x = sqrt(freedom) tan(angle) the density becomes a power of the cosine.
    angle = np.linspace(0, math.atan(t / math.sqrt(freedom)), 200_001)
    constant = math.gamma((freedom + 1) / 2) / (math.gamma(freedom / 2) * math.sqrt(math.pi))
    density = np.cos(angle) ** (freedom - 1)
    return 1 - 2 * constant * float(np.sum((density[1:] + density[:-1]) / 2) * angle[1])


def line_of(text, title):
    """The fields of the first Markdown table line that begins with ``title``."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    fields = [[field.strip() for field in line.strip("|").split("|")] for line in lines]
    return next(found for found in fields if found[0] == title)


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# --------------------------------------------------------------------------------------------------
# Statistics
# --------------------------------------------------------------------------------------------------


def best(found):
    """{setting: rows that are the best}."""
    return {s: [r for r in found.rows if found.cells.best[r, s]] for s in found.settings}


def baseline(found):
    return {s: [r for r in found.rows if found.cells.baseline[r, s]] for s in found.settings}


def untested(tests):
    return [(t.row, t.other, t.setting) for t in tests if t.missing]


def test_mean_and_sample_deviation_by_hand():
    found = evaluate("table2", table({"single": (0.2, 0.4, 0.9, None)}), SEEDS)
    one = found.cells.loc[("single", "supervised")]
    assert one["mean"] == pytest.approx(0.5)
    assert one.sd == pytest.approx(math.sqrt((0.09 + 0.01 + 0.16) / 2))  # n - 1, not n
    assert (one.n, one.wanted, one.complete) == (3, 4, False)
    found = evaluate("table2", table({"single": (0.2,)}, seeds=[1]), [1])
    one = found.cells.loc[("single", "supervised")]
    assert math.isnan(one.sd)
    assert one.complete and found.complete
    found = evaluate("table2", table({"single": (None,) * 4}), SEEDS)
    one = found.cells.loc[("single", "supervised")]
    assert (one.n, one.complete, found.complete) == (0, False, False)
    assert math.isnan(one["mean"])


def test_what_is_best_what_is_the_baseline_and_what_is_tested():
    found = evaluate("table2", table(VALUES), SEEDS)
    assert found.rows == ["single", "common", "naive", "joint"]
    assert best(found) == {"supervised": ["joint"]}
    assert baseline(found) == {"supervised": ["common"]}
    tested = {test.row: test for test in found.tests}
    assert list(tested) == ["naive", "joint"]
    for row, test in tested.items():
        differences = [a - b for a, b in zip(VALUES[row], VALUES["common"], strict=True)]
        assert test.other == "common"
        assert test.p == pytest.approx(two_sided_p(differences), abs=1e-9)
        assert test.difference == pytest.approx(sum(differences) / 4)
        # 3.182446 is the 97.5 % point of Student's t with 3 degrees of freedom, from a table.
        half = 3.182446 * np.std(differences, ddof=1) / 2
        assert test.low == pytest.approx(test.difference - half, abs=1e-7)
        assert test.high == pytest.approx(test.difference + half, abs=1e-7)
    assert tested["joint"].p_holm == pytest.approx(2 * tested["joint"].p)  # the smaller of two
    assert tested["naive"].p_holm == pytest.approx(tested["naive"].p)
    assert (tested["joint"].verdict, tested["naive"].verdict) == (1, 0)


def test_holm_against_a_worked_example():
    # Sorted: 0.005 x 4 = 0.02, 0.01 x 3 = 0.03, 0.03 x 2 = 0.06, 0.04 x 1 = 0.04 -> 0.06.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.6, 0.8]) == [1, 1, 1]
    assert holm([0.02, 0.02]) == pytest.approx([0.04, 0.04])
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), max_size=8))
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_holm_keeps_the_order_and_rejects_what_the_step_down_rule_rejects(p_values):
    corrected = holm(p_values)
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    assert [corrected[i] for i in order] == sorted(corrected)
    assert all(p <= c <= 1 for p, c in zip(p_values, corrected, strict=True))
    steps = [(len(order) - k) * p_values[i] <= 0.05 for k, i in enumerate(order)]
    rejected = len(list(itertools.takewhile(bool, steps)))
    assert [corrected[i] <= 0.05 for i in order] == [k < rejected for k in range(len(order))]


def test_differences_that_do_not_vary_have_a_sign_flip_p():
    values = {"common": (0.1, 0.2, 0.3, 0.4), "naive": (0.1, 0.2, 0.3, 0.4)}
    values["joint"] = tuple(v + 0.1 for v in values["common"])  # constant but for rounding
    results = table(values)
    same, shifted = evaluate("table2", results, SEEDS).tests
    assert (same.difference, same.p, same.low, same.high) == (0, 1, None, None)
    assert shifted.difference == pytest.approx(0.1)
    # Of the 16 ways to flip four signs, two have a mean as far from zero.
    assert (shifted.p, shifted.low) == (2 / 16, None)
    text = markdown("table2", "mini", results, SEEDS)
    assert "nan" not in text.lower()
    assert line_of(text, "supervised")[4:] == ["0.00", "–", "1", "1"]
    assert "sign-flip" in text


def test_a_single_seed_has_neither_deviation_nor_test():
    results = table({row: values[:1] for row, values in VALUES.items()}, seeds=[7])
    found = evaluate("table2", results, [7])
    assert [test.p for test in found.tests] == [None, None]
    assert [test.p_holm for test in found.tests] == [None, None]
    assert found.tests[1].difference == pytest.approx(0.1)
    text = markdown("table2", "mini", results, [7])
    assert line_of(text, ROWS["joint"].title)[1] == "**70.0**"
    assert "n = 1" in text
    assert "nan" not in text.lower()
    assert "▲ ▼" not in text


def test_pairs_are_of_one_kind_of_processor():
    """Seed 3 of joint ran elsewhere: three pairs are left. Of naive none is."""
    elsewhere = {("joint", 3), *(("naive", seed) for seed in SEEDS)}
    runs = [
        r._replace(processor="Xeon" if (r.row, r.seed) in elsewhere else "EPYC")
        for r in table(VALUES)
    ]
    naive, joint = evaluate("table2", runs, SEEDS).tests
    assert (joint.n, joint.apart) == (3, 1)
    differences = [0.10, 0.09, 0.10]  # of seeds 1, 2 and 4
    assert joint.difference == pytest.approx(sum(differences) / 3)
    assert joint.p == joint.p_holm == pytest.approx(two_sided_p(differences), abs=1e-9)
    assert (naive.p, naive.missing) == (None, "no seed has both runs of one kind of processor")
    text = markdown("table2", "mini", runs)
    assert line_of(text, "supervised")[3] == "3"
    assert "from different processors: JTDS, supervised (1)." in text
    assert "Not tested: N-JTDS, supervised (no seed has both" in text
    assert line_of(text, ROWS["joint"].title)[1] == "**70.0 ± 0.8** ▲"  # means are of all seeds
    assert "processors" not in markdown("table2", "mini", table(VALUES))


def test_an_incomplete_cell_is_not_best_not_baseline_and_not_tested():
    values = VALUES | {
        "linear": (0.9, 0.9, 0.9, None),  # would be best and baseline
        "joint": (0.95, None, 0.95, 0.95),
        ABLATIONS[0]: (0.5, 0.6, 0.5, 0.6),
    }
    found = evaluate("table2", table(values), SEEDS)
    assert best(found) == {"supervised": ["naive"]}
    assert baseline(found) == {"supervised": ["common"]}
    assert [test.row for test in found.tests if not test.missing] == ["naive"]
    assert untested(found.tests) == [("joint", "common", "supervised")]
    assert untested(found.ablations) == [(ABLATIONS[0], "joint", "supervised")]
    text = markdown("table2", "mini", table(values), SEEDS)
    assert line_of(text, ROWS["linear"].title)[1] == "90.0 ± 0.0 (3 of 4)"
    assert "Incomplete: 22 of 24 runs are done." in text
    title = ROWS["joint"].title
    assert f"Not tested: {title}, supervised ({title} lacks runs)." in text


def test_without_a_complete_baseline_nothing_is_tested_and_it_says_so():
    values = {"common": (0.5, None, 0.5, 0.5), "joint": VALUES["joint"]}
    found = evaluate("table2", table(values), SEEDS)
    assert baseline(found) == {"supervised": []}
    assert untested(found.tests) == [("joint", None, "supervised")]
    assert "no baseline is complete" in markdown("table2", "mini", table(values), SEEDS)


def test_ties_share_the_best_and_do_not_depend_on_order():
    values = {"single": (0.1, 0.2, 0.3, 0.7), "common": (0.7, 0.3, 0.2, 0.1)}
    found = evaluate("table2", table(values), SEEDS)
    assert best(found) == {"supervised": ["single", "common"]}
    assert baseline(found) == {"supervised": ["single"]}


def test_a_cell_without_any_result_is_wanted_all_the_same():
    results = cell("single", "corrupted_0.2", VALUES["single"])
    results += cell("common", "corrupted_0.6", VALUES["common"])
    found = evaluate("table4", results, SEEDS)
    assert found.settings == ["corrupted_0.2", "corrupted_0.6"]  # nobody asked for 40 %
    assert tuple(found.cells.loc[("single", "corrupted_0.6"), ["n", "wanted"]]) == (0, 4)
    assert line_of(markdown("table4", "mini", results, SEEDS), ROWS["single"].title)[1:] == [
        "**50.0 ± 1.6** †",
        "– (0 of 4)",
    ]


def test_families_of_schedules_and_of_ablations_areapart():
    rng = random.Random(0)
    rows = ["common", "joint", "naive", *ABLATIONS[:3]]
    results = [
        r
        for setting in TABLES["table4"].settings
        for row in rows
        for r in cell(row, setting, [rng.uniform(0.4, 0.6) for _ in SEEDS])
    ]
    found = evaluate("table4", results, SEEDS)
    assert {(t.row, t.other) for t in found.tests} == {("joint", "common"), ("naive", "common")}
    assert {t.other for t in found.ablations} == {"joint"}
    assert (len(found.tests), len(found.ablations)) == (6, 9)
    for family in (found.tests, found.ablations):
        smallest = min(family, key=lambda test: test.p)
        assert smallest.p_holm == pytest.approx(min(1, len(family) * smallest.p))


def test_another_missing_package_is_not_hidden():
    with pytest.raises(ModuleNotFoundError), needs("scipy", "a test", "file"):
        raise ModuleNotFoundError(name="somethingelse")


# --------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------


def test_markdown_by_hand():
    text = markdown("table2", "mini", table(VALUES), notes=["chosen on `valid_accuracy`"])
    assert text.startswith(f"## Table 2: {TABLES['table2'].title}, {DATASETS['mini'].title}\n")
    assert "Incomplete" not in text
    # Squared deviations of 2, 2 and of 1, 1 points over 3; naive's are 2.5, 2.5, 1.5, 1.5.
    assert line_of(text, ROWS["single"].title)[1:] == ["50.0 ± 1.6"]
    assert line_of(text, ROWS["common"].title)[1] == "60.0 ± 1.6 †"
    assert line_of(text, ROWS["naive"].title)[1] == "60.5 ± 2.4"
    assert line_of(text, ROWS["joint"].title)[1] == "**70.0 ± 0.8** ▲"
    assert "n = 4 seeds (1, 2, 3, 4)" in text
    order = ["*Target task only*", "*Baselines*", "*Schedules*"]
    assert [text.index(title) for title in order] == sorted(text.index(title) for title in order)
    tests = [line.split("|") for line in text.splitlines() if line.startswith("| supervised ")]
    titles = ROWS["joint"].title, ROWS["common"].title
    assert [field.strip() for field in tests[1][2:6]] == [*titles, "4", "+10.00"]
    assert tests[1][6].strip().startswith("+8.70 to")
    assert "- chosen on `valid_accuracy`\n" in text


def test_a_significantly_worse_schedule():
    text = markdown("table2", "mini", table(VALUES | {"joint": (0.5, 0.51, 0.49, 0.5)}), SEEDS)
    assert line_of(text, ROWS["joint"].title)[1] == "50.0 ± 0.8 ▼"
    assert re.search(r"\| +−10.00 \| +−11.30 to −8.70 \|", text)


def test_tidy_csv_and_every_cell_is_traced_to_its_runs(tmp_path):
    paper = {("joint", "supervised"): 83.25}
    values = VALUES | {"naive": (0.58, 0.63, None, 0.62)}
    paths = write_table(
        *("table2", "digits", table(values)), paper=paper, out=tmp_path / "new" / "out"
    )
    assert [p.name for p in paths] == [
        *("table2.md", "table2.csv", "table2.tex", "table2_runs.csv")
    ]
    lines = {row["row"]: row for row in read_csv(paths[1])}
    assert lines["joint"] == {
        "table": "table2",
        "dataset": "digits",
        "row": "joint",
        "title": ROWS["joint"].title,
        "setting": "supervised",
        "n": "4",
        "wanted": "4",
        "mean": "70.000000",
        "sd": f"{math.sqrt(2 / 3):.6f}",
        "best": "1",
        "baseline": "0",
        "against": "common",
        "diff": "10.000000",
        "p_holm": f"{two_sided_p([0.10, 0.09, 0.11, 0.10]):.6g}",
        "paper": "83.25",
    }
    assert [lines["common"][k] for k in ("best", "baseline", "against")] == ["0", "1", ""]
    assert [lines["naive"][k] for k in ("n", "wanted", "p_holm")] == ["3", "4", ""]
    runs = read_csv(paths[3])
    assert len(runs) == 16
    for row, cell_line in lines.items():
        done = [float(r["test_accuracy"]) for r in runs if r["row"] == row and r["state"] == "done"]
        assert 100 * sum(done) / len(done) == pytest.approx(float(cell_line["mean"]))
    given_, missing = runs[0], [r for r in runs if r["state"] == "failed"]
    assert (given_["identity"], given_["directory"]) == ("idsingle1", "runs/single-supervised-1")
    assert given_["command"] == "python train_bilevel.py --seed 1"
    assert [(r["row"], r["seed"], r["test_accuracy"]) for r in missing] == [("naive", "3", "")]
    assert "83.2" in line_of(paths[0].read_text(), ROWS["joint"].title)[2]


def test_the_paper_column(tmp_path):
    results, title = table(VALUES), ROWS["joint"].title
    assert line_of(markdown("table2", "cub", results), "method")[1:] == ["supervised"]
    empty = markdown("table2", "cub", results, paper={})
    assert line_of(empty, "method")[1:] == ["supervised", "paper"]
    assert line_of(empty, title)[2] == "–"
    paper = {("joint", "supervised"): 70.0}
    assert line_of(markdown("table2", "cub", results, paper=paper), title)[2] == "70.0"


def test_an_ablation_is_tested_against_its_own_whole_method():
    values = dict.fromkeys(("joint", "joint_stable", "stable_equal_share"), VALUES["common"])
    found = evaluate("table2", table(VALUES | values | {ABLATIONS[0]: VALUES["common"]}), SEEDS)
    pairs = {(test.row, test.other) for test in found.ablations}
    assert pairs == {(ABLATIONS[0], "joint"), ("stable_equal_share", "joint_stable")}


def test_the_same_results_give_the_same_cells(tmp_path):
    results = table(VALUES | {ABLATIONS[0]: VALUES["common"]})
    shuffled = random.Random(1).sample(results, len(results))
    one = write_table("table2", "cub", results, notes=["note"], out=tmp_path / "one")
    two = write_table("table2", "cub", shuffled, SEEDS[::-1], notes=["note"], out=tmp_path / "two")
    for path, other in zip(one[:3], two[:3], strict=True):
        assert path.read_bytes() == other.read_bytes(), path.name
    assert one[0].read_text() == markdown("table2", "cub", results, notes=["note"])


# Commands and notes as they may come, and what they have to be in either format.
NOTES = [
    ("a|b *c* <b> [x](y)", r"a\|b \*c\* \<b> \[x\](y)", "a$|$b *c* $<$b$>$ [x](y)"),
    ("aux_weight 5% & _it_ #1 $x$", r"aux_weight 5% & \_it\_ #1 \$x\$", None),
    ("`--a_b $X | tee {y}`", "`--a_b $X | tee {y}`", r"\texttt{{-}{-}a\_b \$X $|$ tee \{y\}}"),
    ("p < 0.05 of 1 ~ 2", r"p < 0.05 of 1 \~ 2", r"p $<$ 0.05 of 1 \textasciitilde{} 2"),
    ("one\n\n## two", "one ## two", r"one \#\# two"),
    ("back\\slash ~ ^", "back\\\\slash \\~ ^", None),
]


@pytest.mark.parametrize(("note", "in_markdown", "in_latex"), NOTES)
def test_special_characters_of_notes(tmp_path, note, in_markdown, in_latex):
    paths = write_table("table2", "mini", table(VALUES), notes=[note, "last"], out=tmp_path)
    assert paths[0].read_text().endswith(f"\n- {in_markdown}\n- last\n")
    text = paths[2].read_text()
    check_latex(text)
    assert in_latex is None or f"\n{in_latex}\\par\n" in text


def check_latex(text):
    """Groups closed, as many cells in every line as columns, no character left active."""
    bare = re.sub(r"\\[\\{}$&#%_~]", "", text)  # escaped, a line's end, an accent
    depths = list(itertools.accumulate((c == "{") - (c == "}") for c in bare))
    assert min(depths) == 0 == depths[-1]
    assert bare.count("$") % 2 == 0
    assert re.findall(r"%.*", bare) == [r"% Needs \usepackage{booktabs}."]
    assert bare.count(r"\begin{table}") == bare.count(r"\end{table}") > 0
    assert "#" not in bare
    assert "~" not in bare
    for columns, body in re.findall(
        r"\\begin\{tabular\}\{@\{\}([lr]+)@\{\}\}(.*?)\\end\{tabular\}", text, re.DOTALL
    ):
        lines = [line for line in body.splitlines() if line.endswith(r"\\")]
        assert lines
        for line in lines:
            assert len(re.findall(r"(?<!\\)&", line)) == len(columns) - 1
        assert body.count(r"\toprule") == body.count(r"\bottomrule") == 1
        rest = re.sub(r".*\\\\$|\\(top|mid|bottom)rule", "", body, flags=re.MULTILINE)
        assert not rest.strip()


def test_latex_by_hand(tmp_path):
    text = write_table("table2", "cub", table(VALUES), paper={}, out=tmp_path)[2].read_text()
    check_latex(text)
    line = f"{ROWS['single'].title} & 50.0 $\\pm$ 1.6 & -- \\\\\n"
    assert line + "\\addlinespace \\textit{Baselines} &  &  \\\\\n" in text  # kinds apart
    assert r"60.0 $\pm$ 1.6$^{\dagger}$ & --" in text
    assert ROWS["joint"].title + r" & \textbf{70.0 $\pm$ 0.8}$^{+}$ & --" in text


# --------------------------------------------------------------------------------------------------
# The paper's figures
# --------------------------------------------------------------------------------------------------


def read_paper_text(folder, text):
    path = folder / "paper.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_paper(path)


def test_a_paper_file(tmp_path):
    assert read_paper_text(tmp_path, HEADER) == {}
    text = (
        HEADER + "\ncub, table4 ,joint,corrupted_0.2, 83.5\r\n,,,,\n" + '"mini",table3,task,semi,0'
    )
    expected = {
        ("cub", "table4", "joint", "corrupted_0.2"): 83.5,
        ("mini", "table3", "task", "semi"): 0.0,
    }
    assert read_paper_text(tmp_path, text) == expected
    assert read_paper_text(tmp_path, b"\xef\xbb\xbf" + text.encode()) == expected  # as Excel saves


LINE = "cub,table2,joint,supervised,83.5\n"


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("", 1, "the header is 'missing'"),
        ("dataset;table;row;setting;accuracy\n", 1, "the header is"),
        (LINE, 1, "the header is"),
        (HEADER + "imagenet,table2,joint,supervised,1\n", 2, "no dataset is called 'imagenet'"),
        (HEADER + "cub,table9,joint,supervised,1\n", 2, "no table is called"),
        (HEADER + LINE + "cub,table2,jtds,supervised,1\n", 3, "no row is called 'jtds'"),
        (HEADER + "cub,table2,joint,semi,1\n", 2, "no setting is called 'semi'"),
        (HEADER + "\n\ncub,table2,joint,supervised,good\n", 4, "the accuracy is 'good'"),
        (HEADER + "cub,table2,joint,supervised,nan\n", 2, "from 0 to 100"),
        (HEADER + "cub,table2,joint,supervised,-1\n", 2, "from 0 to 100"),
        (HEADER + "cub,table2,joint,supervised,100.1\n", 2, "from 0 to 100"),
        (HEADER + "cub,table2,joint,supervised,\n", 2, "from 0 to 100"),
        (HEADER + "cub,table2,joint,supervised,83,5\n", 2, "6 fields; expected 5"),
        (HEADER + LINE + LINE, 3, "is given twice"),
        (HEADER.encode() + b"cub,table2,joint,\xff,1\n", 2, "not UTF-8"),
    ],
)
def test_mistakes_in_a_paper_file_are_named_with_their_line(tmp_path, text, line, said):
    with pytest.raises(UserError) as caught:
        read_paper_text(tmp_path, text)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'paper.csv'}, line {line}: ")
    assert said in message
    assert "\n" not in message


def test_a_paper_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"paper.csv cannot be read \(No such file"):
        read_paper(tmp_path / "paper.csv")


# --------------------------------------------------------------------------------------------------
# Charts
# --------------------------------------------------------------------------------------------------


def artists(figure):
    """{gid: artist} of what stands for a number."""
    (axes,) = figure.axes
    return {a.get_gid(): a for a in axes.get_children() if a.get_gid()}


def corrupted_results():
    rng = random.Random(5)
    return [
        r
        for setting in ("supervised", *TABLES["table4"].settings)
        for row in ROWS
        for r in cell(row, setting, [rng.uniform(0.3, 0.8) for _ in SEEDS])
    ]


def test_the_rate_chart_shows_the_means_and_deviations():
    results = corrupted_results()
    results = [  # one cell loses a run, another all of them
        r._replace(state="failed", test_accuracy=None)
        if (r.row, r.setting) == ("task", "corrupted_0.4")
        or (r.row, r.setting, r.seed) == ("linear", "corrupted_0.2", 1)
        else r
        for r in results
    ]
    clean = evaluate("table2", [r for r in results if r.setting == "supervised"], SEEDS)
    figure = table_figure("table4", results, "cub", clean)
    drawn = artists(figure)
    shown = [row for row in ROWS if ROWS[row].kind != ABLATION]
    assert {gid[5:] for gid in drawn if gid.startswith("mean:")} == set(shown)
    rates = (0, 20, 40, 60)
    assert list(figure.axes[0].get_xticks()) == list(rates)
    for row in shown:
        x, y = drawn[f"mean:{row}"].get_data()
        bars = iter(drawn[f"spread:{row}"].get_segments())
        for k, setting in enumerate(("supervised", *TABLES["table4"].settings)):
            values = [
                r.test_accuracy
                for r in results
                if (r.row, r.setting, r.state) == (row, setting, "done")
            ]
            assert abs(x[k] - rates[k]) < 5  # nearer to its own rate than to another
            bar = next(bars)
            if not values:
                assert np.isnan(y[k])
                continue
            mean, sd = 100 * np.mean(values), 100 * np.std(values, ddof=1)
            assert y[k] == pytest.approx(mean)
            assert [p[1] for p in bar] == pytest.approx([mean - sd, mean + sd])
            assert [p[0] for p in bar] == pytest.approx([x[k]] * 2)
    x, y = drawn["hollow:linear"].get_data()
    assert list(x) == [drawn["mean:linear"].get_xdata()[1]]
    assert list(drawn["hollow:joint"].get_xdata()) == []
    # No two methods at one place, and every method has its name beside it once.
    places = [drawn[f"mean:{row}"].get_xdata()[0] for row in shown]
    assert len(set(places)) == len(shown)
    texts = [t.get_text() for t in figure.axes[0].texts]
    assert all(texts.count(ROWS[row].title) == 1 for row in shown)


def test_the_rate_chart_without_the_supervised_setting():
    results = [r for r in corrupted_results() if r.setting != "supervised"]
    figure = table_figure("table4", results, "cub")
    assert list(figure.axes[0].get_xticks()) == [20, 40, 60]


def test_the_method_chart_shows_seeds_means_and_deviations():
    values = VALUES | {"linear": (0.9, None, 0.8, 0.7), "task": (None,) * 4}
    figure = table_figure("table2", table(values | {ABLATIONS[0]: VALUES["joint"]}), "mini")
    drawn = artists(figure)
    (axes,) = figure.axes
    titles = [label.get_text() for label in axes.get_yticklabels()]
    assert titles == [ROWS[row].title for row in ROWS if row in values]
    for row, height in zip([row for row in ROWS if row in values], axes.get_yticks(), strict=True):
        done = [100 * v for v in values[row] if v is not None]
        if not done:
            assert f"mean:{row}" not in drawn
            continue
        assert list(drawn[f"seeds:{row}"].get_xdata()) == pytest.approx(done)
        mean, sd = np.mean(done), np.std(done, ddof=1)
        x, y = drawn[f"mean:{row}"].get_data()
        assert (x[0], y[0]) == (pytest.approx(mean), height)
        assert list(drawn[f"spread:{row}"].get_xdata()) == pytest.approx([mean - sd, mean + sd])
    assert drawn["baseline"].get_xdata()[0] == pytest.approx(60)  # not the incomplete one
    texts = [t.get_text() for t in axes.texts]
    assert {"70.0 ± 0.8", "80.0 ± 10.0 (3 of 4)", "no run (0 of 4)"} <= set(texts)


def test_methods_look_different():
    from auxilearn.report import style

    found = looks(style)
    found = {row: look for row, look in found.items() if ROWS[row].kind != ABLATION}
    assert len({(look.colour, look.marker) for look in found.values()}) == len(found)
    assert all(look.strong == (ROWS[row].kind == SCHEDULE) for row, look in found.items())
    assert {ROWS[row].kind for row in found} == {TARGET_ONLY, BASELINE, SCHEDULE}


def test_names_are_moved_apart_no_further_than_need_be():
    assert list(apart([1, 5, 9], 2, 0, 10)) == [1, 5, 9]
    assert list(apart([5, 5], 2, 0, 10)) == [4, 6]
    assert apart([1, 5, 5.5], 2, 0, 10) == pytest.approx([1, 4.25, 6.25])
    assert list(apart([0, 0, 0], 2, 0, 10)) == [0, 2, 4]
    assert list(apart([10, 10, 10], 2, 0, 10)) == [6, 8, 10]
    rng = random.Random(3)
    for _ in range(20):
        wanted = sorted(rng.uniform(0, 10) for _ in range(6))
        found = apart(wanted, 1.5, 0, 10)
        assert min(np.diff(found)) >= 1.5 - 1e-9
        assert found[0] >= 0 and found[-1] <= 10


def test_charts_are_written_alike_every_time(tmp_path):
    results = table(VALUES)
    one = draw_table(sheet("table2", "mini", results), tmp_path / "one")
    assert [path.name for path in one] == ["table2.png", "table2.svg"]
    two = draw_table(sheet("table2", "mini", results[::-1]), tmp_path / "two")
    for path, other in zip(one, two, strict=True):
        assert path.read_bytes() == other.read_bytes()
    width = int.from_bytes(one[0].read_bytes()[16:20], "big")
    assert width >= 150 * 7
    nothing = [r._replace(state="to do", test_accuracy=None) for r in results]
    assert draw_table(sheet("table2", "mini", nothing), tmp_path / "one") == []
    assert list((tmp_path / "one").iterdir()) == []  # not the chart of other results


def test_without_matplotlib_the_table_is_written_and_the_chart_says_what_to_install(
    tmp_path, monkeypatch
):
    for name in [n for n in sys.modules if n.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "auxilearn.report.style", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert len(write_table("table2", "mini", table(VALUES), out=tmp_path)) == 4
    with pytest.raises(UserError, match=r"needs matplotlib: .*-r requirements-tables\.txt"):
        draw_table(sheet("table2", "mini", table(VALUES)), tmp_path)
