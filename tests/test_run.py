"""The main job, end to end and for real: a suite of tiny models, run, resumed, shown, exported, recomputed."""

from __future__ import annotations

import csv
import json
from dataclasses import replace

import pytest

from effbench.metrics import METRICS
from effbench.store import Store
from tests.commands import ROOT, effbench

SHARED = {name for name, row in METRICS.items() if "own" not in row.tags}  # what the rows of every workload have

SUITE = """\
name: end-to-end
protocol: smoke
cases:
  - workload: pretrain
    params: {batch_size: 2, seq_len: 32, quality_steps: 3, validation_tokens: 256}
    model: tiny-llama
    techniques: [mha, mqa]
  - workload: generate
    params: {batch_size: 2, prompt_tokens: 16, new_tokens: 8, validation_tokens: 512}
    model: tiny-qwen2
    weights: trained
    techniques: [bf16]
  - workload: finetune
    params: {batch_size: 2, seq_len: 32, quality_steps: 3, validation_tokens: 256}
    model: tiny-qwen2
    weights: trained
    techniques: [[lora, bf16]]
  - workload: generate
    model: tiny-llama
    techniques: [lora]
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    path = folder / "end-to-end.yaml"
    path.write_text(SUITE)
    done = effbench("run", path, "--results", folder / "results", timeout_s=400)
    return done, Store(folder / "results"), path


def rows_of(store):
    return {(row.workload, row.techniques): row for row in store.cases()}


def values(row):
    return {m.name: m for m in row.metrics}


def test_every_case_is_measured_or_skipped_with_a_reason(ran):
    done, store, _ = ran
    assert done.returncode == 0, done.stdout + done.stderr
    rows = rows_of(store)
    assert {row.status for row in rows.values()} == {"ok", "skipped"}
    assert "training workload" in rows["generate", ("lora",)].reason


def test_baselines_that_the_suite_does_not_list_are_rows_too(ran):
    rows = rows_of(ran[1])
    bf16, lora = rows["generate", ("bf16",)], rows["finetune", ("lora", "bf16")]
    ids = {row.case_id: row for row in rows.values()}
    assert ids[bf16.baseline_case_id].techniques == ("fp32",)
    assert ids[lora.baseline_case_id].techniques == ("lora",)


def test_the_table_and_the_way_to_the_board_are_printed(ran):
    out = ran[0].stdout
    for word in ("pretrain", "generate", "finetune", "mqa", "lora+bf16", "make board"):
        assert word in out


def test_every_metric_of_the_table_is_in_every_measured_row(ran):
    for row in ran[1].cases():
        if row.status == "ok":
            assert set(values(row)) == SHARED


def test_the_paper_s_six_have_values_where_this_machine_can_measure_them(ran):
    rows = rows_of(ran[1])
    generated, trained = values(rows["generate", ("bf16",)]), values(rows["pretrain", ("mqa",)])
    for found, names in (
        (generated, ("amu_gb", "pcu", "al_s", "it_tokens_per_s", "mcr", "ttft_s", "tpot_s", "kv_cache_bytes", "bits_per_byte")),
        (trained, ("amu_gb", "pcu", "al_s", "tt_tokens_per_param_s", "validation_loss", "quality")),
    ):
        for name in names:
            assert found[name].value is not None, (name, found[name].reasons)
            assert found[name].n == 2
    assert generated["aec_w"].value is None or generated["aec_w"].value > 0


def test_mfu_is_there_once_the_device_is_calibrated(ran):
    """Peaks are looked up by the dtype that the launch states, so both must use the same names."""
    from effbench.hardware import DTYPES

    stated = {launch.facts["compute_dtype"] for launch in ran[1].launches()}
    assert stated == {"fp32", "bf16"}
    assert stated <= set(DTYPES)


def test_half_the_bytes_is_half_the_bytes(ran):
    bf16 = values(rows_of(ran[1])["generate", ("bf16",)])
    assert bf16["weight_bytes"].ratio == pytest.approx(0.5, rel=0.01)
    assert bf16["kv_cache_bytes"].ratio == pytest.approx(0.5)
    assert 1.5 < bf16["mcr"].value < 2.5


def test_sharing_heads_saves_cache_and_parameters_as_the_formula_says(ran):
    mqa = values(rows_of(ran[1])["pretrain", ("mqa",)])
    assert mqa["params_total"].ratio < 1


def test_a_row_says_which_kernels_ran(ran):
    details = {row.workload: json.loads(row.provenance["details"]) for row in ran[1].cases() if row.status == "ok"}
    assert {found["attention_backend"] for found in details.values()} == {"sdpa"}
    assert details["generate"]["decode_engine"] == "eager"
    assert not details["pretrain"].get("decode_engine")


def test_a_second_run_repeats_nothing(ran):
    _, store, path = ran
    before = store.fingerprint("launches")
    again = effbench("run", path, "--results", store.path)
    assert again.returncode == 0
    assert "cases are here already" in again.stdout
    assert store.fingerprint("launches") == before


def test_every_number_follows_from_its_trace(ran, tmp_path):
    done = effbench("export", tmp_path / "rows.csv", "--results", ran[1].path, "--recompute")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(ran[1].cases())} of {len(ran[1].cases())} rows" in done.stdout
    rows = list(csv.DictReader((tmp_path / "rows.csv").read_text().splitlines()))
    assert {row["metric"] for row in rows} >= SHARED


def test_a_number_that_does_not_follow_from_its_trace_is_named(ran, tmp_path):
    forged = Store(tmp_path / "forged")
    for launch in ran[1].launches():
        forged.write_launch(launch, ran[1].trace(launch.launch_id))
    for row in ran[1].cases():
        metrics = tuple(replace(m, value=m.value * 0.5) if m.name == "al_s" and m.value else m for m in row.metrics)
        forged.write_case(replace(row, metrics=metrics) if row.techniques == ("mqa",) else row)
    done = effbench("export", tmp_path / "rows.parquet", "--results", forged.path, "--recompute")
    assert done.returncode == 1
    assert "mqa: al_s is" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_committed_rows_still_follow_from_their_traces(tmp_path):
    done = effbench("export", tmp_path / "rows.csv", "--results", ROOT / "results" / "reference", "--recompute")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "12 of 12 rows" in done.stdout
    younger = done.stdout.partition("Younger than some rows, so not in them: ")[2]
    assert {"tensor_peak_ratio"} <= set(younger.split(".\n")[0].split(", ")) and "al_s" not in younger.split(", ")


def test_show_gives_one_json_document(ran):
    done = effbench("show", "--results", ran[1].path, "--json")
    document = json.loads(done.stdout)
    assert document


def test_plan_shows_what_would_run_compared_with_what(ran):
    cases = {case["name"]: case for case in json.loads(effbench("plan", ran[2], "--json").stdout)["cases"]}
    assert cases["pretrain/tiny-llama/mqa"]["baseline"] == "pretrain/tiny-llama/mha"
    assert cases["finetune/tiny-qwen2/lora+bf16"]["baseline"] == "finetune/tiny-qwen2/lora"
    assert cases["generate/tiny-llama/lora"]["skip_reason"]
