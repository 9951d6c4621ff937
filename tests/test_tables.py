"""`tables` reproduces the paper's figures to the last printed digit, or prints the difference."""

import json
import math

import pytest

from mpdit_jax import tables
from mpdit_jax.config.ablation import ROWS
from mpdit_jax.model.accounting import paper_macs

# Parameters in millions and "GFLOPs", as the paper prints them.
PRINTED = {
    "dit_b_2": ("130.0", "23.0"),
    "dit_b_2_shared": ("90.3", "22.9"),
    "dit_b_2_shared_tokens": ("101.9", "24.3"),
    "dit_b_2_shared_tokens_fno": ("101.2", "24.3"),
    "mpdit_b_k4": ("104.8", "13.9"),
    "mpdit_b_k6": ("104.8", "16.6"),
    "mpdit_b_k8": ("104.8", "19.3"),
    "dense_xl": ("473.1", "125.5"),
    "mpdit_xl_k4": ("481.2", "53.2"),
    "mpdit_xl_k6": ("481.2", "59.3"),
    "mpdit_xl_k8": ("481.2", "65.4"),
    "dit_xl_2": ("", "118.66"),
    "sit_xl_2": ("", "118.66"),
}
# What is not reproduced, in millions of parameters or in GMACs.
APART = {("dit_b_2", "parameters"): 0.5, ("mpdit3_xl_512", "gmacs"): -13.52}


@pytest.fixture(scope="module")
def rows():
    return {row["name"]: row for row in tables.rows()}


@pytest.mark.parametrize("name", PRINTED)
def test_the_papers_operations_are_ours_cut_at_its_last_digit(name):
    printed = PRINTED[name][1]
    digits = len(printed.partition(".")[2])
    assert f"{math.floor(paper_macs(ROWS[name].model) / 1e9 * 10**digits) / 10**digits:.{digits}f}" == printed


def test_every_figure_agrees_or_the_table_says_by_how_much(rows):
    for name, (params, gmacs) in PRINTED.items():
        assert (rows[name]["parameters_paper"] or "", rows[name]["gmacs_paper"]) == (params, gmacs)
    for name, row in rows.items():
        for kind in ("parameters", "gmacs"):
            assert row[f"{kind}_difference"] == APART.get((name, kind)), (name, kind)
    text = tables.as_markdown(list(rows.values()))
    assert "not reproduced: +0.5 M parameters (+0.4%)" in text
    assert "not reproduced: -13.52 GMACs (-9.8%)" in text
    assert text.count("not reproduced") == len(APART)


def test_difference():
    assert tables.difference(101.87, "101.9") is None  # rounded
    assert tables.difference(104.85, "104.8") is None  # cut
    assert tables.difference(101.7, "101.9") == -0.2
    assert tables.difference(1.0, "") is None


def test_masked_training_costs_less_than_sampling(rows):
    masked = rows["dit_xl_2_masked_75"]
    assert masked["gmacs_true"] == rows["dit_xl_2"]["gmacs_true"]
    # Random and structured reduction at equal compute.
    assert masked["gmacs_training"] == pytest.approx(rows["mpdit_xl_k6"]["gmacs_training"], rel=0.04)
    assert masked["parameters"] == rows["dit_xl_2"]["parameters"] + 1152  # the mask token


def test_both_formats(capsys):
    assert tables.main(["--format=json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in found] == list(ROWS)
    assert tables.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("| `") for line in lines) == len(ROWS)
    assert "### Class tokens" in lines
