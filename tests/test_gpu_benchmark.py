"""The GPU benchmark runs from end to end on tiny models, and records what goes wrong."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from benchmarks.capacity_step import DEVICES
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import agreement, machine
from benchmarks.gpu.report import markdown
from benchmarks.gpu.update import update_flops
from benchmarks.llama_costs import Shape, parameter_count
from tests.tiny import id_sum, make_env, make_lm


def test_a_dry_run_measures_every_part_and_writes_it_down(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "TINY", {"tiny": Shape(64, 32, 48, 2, 4, 2)})
    results = gpu.run(gpu.parse_arguments(["--dry-run", "--batches", "2", "--out", str(tmp_path)]))
    assert gpu.failures(results) == [] and not any("error" in row for row in results["rows"])
    decoding = [row for row in results["rows"] if row["part"] == "decode"]
    assert len({row["engine"] for row in decoding}) == 5
    assert all(row["tokens_per_second"] > 0 for row in decoding)
    assert [row["flops_share"] > 0 for row in results["rows"] if row["part"] == "grpo"] == [True]
    assert all(row["agrees"] for row in results["rows"] if row["part"] == "agree")
    text = (tmp_path / "dry-run.md").read_text()
    assert text.startswith("**A dry run") and text == markdown(results)
    assert json.loads((tmp_path / "dry-run.json").read_text()) == json.loads(json.dumps(results))


def test_without_cuda_only_a_dry_run_is_offered(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="--dry-run"):
        gpu.run(gpu.parse_arguments([]))


def test_what_goes_wrong_is_a_row_and_only_want_of_memory_is_no_failure():
    def runs_out():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 TiB")

    def through_a_wrapper():
        raise RuntimeError("continuous batching: CUDA out of memory.")

    def is_wrong():
        raise RuntimeError("shapes do not match")

    for function in (runs_out, through_a_wrapper, lambda: {"x": torch.empty(2**50, dtype=torch.float64)}):
        row = machine.attempt(function, part="decode", model="3B", engine="e", batch=512)
        assert (row["error"], row["batch"]) == ("out of memory", 512)
        line = markdown({"dry_run": False, "device": DEVICE, "rows": [row]}).splitlines()[-1]
        assert line.startswith("| 3B | e | 512 | out of memory |") and line.count("|") == 10
        assert gpu.failures({"rows": [row]}) == []
    row = machine.attempt(is_wrong, part="decode", model="3B")
    assert gpu.failures({"rows": [row]}) == ["decode, 3B: RuntimeError: shapes do not match"]
    assert gpu.failures({"rows": [{"part": "agree", "model": "3B", "agrees": False}]})


DEVICE = {"name": "a device", "torch": "2", "transformers": "5"}


def test_nominal_figures_are_those_of_the_very_board():
    assert machine.nominal("NVIDIA L40S") == DEVICES["L40S"] != machine.nominal("NVIDIA L4")
    assert machine.nominal("NVIDIA H100 80GB HBM3") == DEVICES["H100"]
    assert machine.nominal("NVIDIA A100-SXM4-80GB") == DEVICES["A100"]
    for other in ("NVIDIA A100-SXM4-40GB", "NVIDIA H100 PCIe", "NVIDIA GH200 480GB", "Tesla T4"):
        assert machine.nominal(other) is None


def test_agreement_notices_another_temperature():
    same = agreement.differences(make_env(reward=id_sum), make_env(reward=id_sum))
    assert same["agrees"] and max(same["largest_difference"].values()) == 0
    warm = agreement.differences(make_env(), make_env(lm=make_lm(temperature=1.1)))
    assert not warm["agrees"] and warm["largest_difference"]["score"] == 0


def test_the_models_have_half_a_billion_and_several_billion_parameters():
    sizes = [parameter_count(shape) / 1e9 for shape in gpu.MODELS.values()]
    np.testing.assert_allclose(sizes, [0.494, 3.213], rtol=1e-3)


def test_update_flops_are_six_for_every_parameter_and_token_where_attention_is_small():
    shape = Shape(1000, 512, 2048, 4, 8, 8, tied=True)
    flops = update_flops(shape, episodes=8, group=1, micro=4, prompt=1, tokens=99)
    assert flops == pytest.approx(6 * parameter_count(shape) * 8 * 100, rel=0.05)
