"""``python -m sparsekern.bench.gpu``, rehearsed on the CPU: every check, kernel, step, table and plot."""

import copy
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import sparsekern as sk
from sparsekern.backends import reference
from sparsekern.bench import gpu, gpu_checks, gpu_kernels, gpu_steps, gpu_table, memory, plot, roofs, timing
from sparsekern.bench.contenders import ENTRIES
from sparsekern.bench.options import Case

CPU = torch.device("cpu")
TINY = Case("zipf", 64, 32, 512, 8)
ROOFS = {"copy_bytes_s": 3e12, "bf16_flops_s": 8e14, "fp32_flops_s": 5e13}
QUICK = ("--device", "cpu", "--quick", "--contenders", "sparsekern", "torch", "--seed", "7")


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """One run of the whole command, shared: its record as written, its exit code."""
    path = tmp_path_factory.mktemp("results") / "rehearsal.json"
    code = gpu.main([*QUICK, "--output", str(path)])
    return SimpleNamespace(path=path, code=code, record=json.loads(path.read_text()))


@pytest.fixture
def record(rehearsal):
    return copy.deepcopy(rehearsal.record)


def as_if_measured_on_a_gpu(record):
    """The layout of such a record, for tables and targets: its figures are made here."""
    record |= {"device": "made up", "device_type": "cuda", "capability": "9.0", "driver": "0", "roofs": ROOFS}
    for case in record["cases"]:
        case["name"] = {"x": "A", "y": "F"}[case["name"]]
        for found in case["steps"].values():
            found |= {"waits": "no", "beyond_bytes": 0}
    return record


def test_the_rehearsal_runs_everything(rehearsal):
    record = rehearsal.record
    assert rehearsal.code == 0
    assert record["finished"]
    assert (record["device"], record["device_type"]) == ("cpu", "cpu")
    assert {"torch", "triton", "cuda", "python", "sparsekern"} <= set(record["versions"])
    assert {"date", "commit", "options", "backends", "seconds"} <= set(record)
    assert record["options"]["seed"] == 7
    assert record["roofs"]["copy_bytes_s"] > 0
    assert record["cases"][0]["first_step_s"] > 0
    assert "tf32" in record["roofs"]["missing"]

    entries = record["checks"]["entries"]
    assert all(entry["passed"] for entry in entries)
    ran = {(entry["shape"], entry["check"], entry["dtype"]) for entry in entries}
    for shape in ("x", "y"):
        routed = "routed_topk_encode, 2 of 8 experts"
        for check in ("topk_encode, auto", routed, "sparse_decode", "gather_dot", "scatter_outer"):
            assert {(shape, check, "float32"), (shape, check, "bfloat16")} <= ran
        for check in ("topk_encode, absolute", "best of 8 groups"):
            assert {(shape, check, "float32"), (shape, check, "bfloat16")} <= ran
        for activation in ("topk", "batchtopk"):
            assert (shape, f"Trainer.step, {activation}, 3 times", "float32") in ran

    assert [(case["name"], case["data"]) for case in record["cases"]] == [
        *[("x", "zipf"), ("y", "zipf"), ("x", "gaussian"), ("y", "gaussian")]
    ]
    for case in record["cases"]:
        assert not case["failed"]
        assert set(case["skipped"]) == ({"select"} if case["data"] == "zipf" else set())
        for found in case["kernels"].values():
            assert 0 < found["ms"]["low"] <= found["ms"]["median"] <= found["ms"]["high"]
            assert found["samples"] == 3
            assert found["first_call_s"] > 0
            assert found["floor_ms"] > 0
        kernels = set(case["kernels"])
        assert {"matmul, bf16", "matmul and torch.topk", "topk_encode", "topk_encode, bf16 weights"} <= kernels
        assert {"sparse_decode", "embedding_bag", gpu_table.BACKWARD} <= kernels
        assert ("routed_topk_encode, 2 of 8 experts" in kernels) == (case["data"] == "zipf")
        assert "topk_encode, absolute" in kernels
        for name in (gpu_table.UPDATE, "gradients and Adam, codes in CSR form", "routed_topk_encode, best of 8 groups"):
            assert (name in kernels) == (case["data"] == "zipf")
        assert list(case["steps"]) == (["sparsekern", "torch"] if case["data"] == "zipf" else [])
    steps = record["cases"][0]["steps"]
    assert steps["sparsekern"]["tokens_s"] == pytest.approx(64e3 / steps["sparsekern"]["step_ms"]["median"])
    assert steps["torch"]["over_sparsekern"]["median"] > 0
    assert steps["sparsekern"]["waits"] is None


def test_a_record_of_a_cpu_is_not_taken_for_one_of_a_gpu(rehearsal, tmp_path, monkeypatch, capsys):
    text = gpu_table.markdown(rehearsal.record)
    assert text.startswith("**A rehearsal on a CPU: no figure of a GPU")
    assert "targets" not in text
    with pytest.raises(SystemExit):
        gpu.parse([*QUICK, "--output", str(tmp_path / "gpu_h100.json")])
    assert "a record of a CPU must not be named after a GPU" in capsys.readouterr().err
    assert gpu.parse([*QUICK]).output is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "torch sees no CUDA GPU here"),
        (["--device", "cpu"], "--device cpu is for rehearsals: add --quick"),
        (["--device", "mps"], "--device must be a CUDA GPU or cpu"),
        ([*QUICK, "--shapes", "F"], "--shapes must be some of x, y, got F"),
        ([*QUICK, "--minutes", "0"], "--minutes must be above 0"),
        ([*QUICK, "--output", "record.txt"], "--output must end in .json"),
    ],
)
def test_options_that_make_no_sense_are_messages(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        gpu.parse(arguments)
    assert stop.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_wrong_kernel_fails_the_checks_and_the_timings_still_run(monkeypatch, tmp_path):
    right = sk.sparse_decode

    def wrong(codes, weight, bias=None):
        out = right(codes, weight, bias)
        return out + 0.1 * (torch.arange(out.numel()) % 7 == 0).view_as(out)

    monkeypatch.setattr(sk, "sparse_decode", wrong)
    path = tmp_path / "r.json"
    code = gpu.main([*QUICK, "--shapes", "x", "--parts", "checks", "kernels", "--output", str(path)])
    record = json.loads(path.read_text())
    assert code == 1
    assert {entry["check"] for entry in record["checks"]["entries"] if not entry["passed"]} == {"sparse_decode"}
    assert record["cases"][0]["kernels"]["topk_encode"]["samples"] == 3
    assert "**FAILED**" in gpu_table.markdown(record)


def problem():
    return gpu_checks.Problem(TINY, CPU, torch.float32, 0)


def break_codes(monkeypatch, spoil):
    right = sk.topk_encode

    def wrong(*arguments, **options):
        codes = right(*arguments, **options)
        spoil(codes)
        return codes

    monkeypatch.setattr(sk, "topk_encode", wrong)


def test_the_encoder_check_sees_wrong_indices_values_and_nan(monkeypatch):
    made = problem()
    assert gpu_checks.encode(made, "auto").passed

    worst = (made.x @ made.weight.T + made.bias).argmin(1).int()
    with monkeypatch.context() as patch:
        break_codes(patch, lambda codes: codes.indices[:, 3].copy_(worst))
        found = gpu_checks.encode(made, "auto")
        assert (found.passed, found.wrong, found.recall) == (False, 64, 1 - 1 / 8)
    with monkeypatch.context() as patch:
        break_codes(patch, lambda codes: codes.values.mul_(1.001))
        found = gpu_checks.encode(made, "auto")
        assert (found.passed, found.wrong) == (False, 0)
        assert found.error == pytest.approx(1e-3, rel=0.01)
    with monkeypatch.context() as patch:
        break_codes(patch, lambda codes: codes.values[5, 2].fill_(float("nan")))
        assert not gpu_checks.encode(made, "auto").passed
    with monkeypatch.context() as patch:
        calls = iter(range(9))
        break_codes(patch, lambda codes: codes.values.mul_(1 + 3e-7 * next(calls)))
        assert not gpu_checks.encode(made, "auto").repeatable


def test_the_check_of_codes_by_size_sees_a_lost_sign(monkeypatch):
    made = problem()
    assert gpu_checks.encode(made, "auto", absolute=True).passed
    break_codes(monkeypatch, lambda codes: codes.values.abs_())
    assert not gpu_checks.encode(made, "auto", absolute=True).passed


def test_the_check_of_groups_sees_a_latent_that_is_not_the_best_and_one_of_another_group(monkeypatch):
    made = problem()
    assert gpu_checks.best_of_groups(made).passed
    right = sk.GroupMax.encode
    for spoil in (lambda indices: indices ^ 1, lambda indices: indices.roll(1, 1)):

        def wrong(self, *arguments, spoil=spoil):
            codes, trace = right(self, *arguments)
            return codes._replace(indices=spoil(codes.indices)), trace

        monkeypatch.setattr(sk.GroupMax, "encode", wrong)
        assert gpu_checks.best_of_groups(made).wrong > 0


def test_the_check_of_routed_encoders_sees_wrong_experts_order_and_latents(monkeypatch):
    made = problem()
    assert gpu_checks.routed(made, 8, 2).passed

    def broken(op, spoil):
        right = getattr(sk, op)
        with monkeypatch.context() as patch:
            patch.setattr(sk, op, lambda *arguments: spoil(right(*arguments)))
            return gpu_checks.routed(made, 8, 2)

    # Everything but the choice stays right: the slots are grouped anew.
    def other_experts(route):
        experts = (route.experts + 1) % 8
        order, offsets = reference.group_slots(experts, 8)
        return route._replace(experts=experts, order=order, offsets=offsets)

    assert broken("route", other_experts).wrong > 0
    assert broken("route", lambda route: route._replace(order=route.order.flip(0))).wrong > 0
    moved = broken("routed_topk_encode", lambda codes: codes._replace(indices=(codes.indices + 64) % 512))
    assert moved.wrong > 0
    assert moved.recall < 1


def test_routed_encoders_are_set_beside_what_their_work_leaves(record):
    made = as_if_measured_on_a_gpu(record)
    case = made["cases"][1]
    found = case["kernels"]["routed_topk_encode, 1 of 8 experts"]
    assert found["against"] == "topk_encode, all experts"
    found["over"]["median"], found["least"] = 0.25, 0.125
    assert ["routed_topk_encode, 1 of 8 experts", "0.250", "0.125", "2.00"] in gpu_table.routed(case).rows
    assert "routed encoders at" in gpu_table.markdown(made)
    case = Case("zipf", 8192, 768, 131072, 32)
    assert roofs.least_routed_ratio(case, 8, 1) == 1 / 8
    assert roofs.least_routed_ratio(case, 128, 1) == 267 / 8192
    assert roofs.routed_encode(case, 8, 2).flops == roofs.encode(case, 131072).flops / 4


@pytest.mark.parametrize("op", ["_gather_dot", "_scatter_outer"])
def test_the_product_checks_see_an_element_that_is_not_written(op, monkeypatch):
    right = getattr(gpu_checks, op)
    check = gpu_checks.PRODUCTS[op[1:]]
    made = problem()
    assert check(made).passed
    row = int(made.codes.firing_counts().argmax()) if op == "_scatter_outer" else int(made.rows[0])

    def forgets(*arguments):
        out = right(*arguments)
        out[row, 1] = 0
        return out

    monkeypatch.setattr(gpu_checks, op, forgets)
    assert not check(made).passed


@pytest.mark.parametrize("activation", [sk.TopK(8), sk.BatchTopK(8)], ids=["topk", "batchtopk"])
def test_the_step_check_sees_a_learning_rate_that_is_off_by_a_thousandth(monkeypatch, activation):
    assert gpu_checks.train(TINY, CPU, 0, activation).passed
    step = sk.Trainer.step

    def wrong(self, x):
        if os.environ.get("SPARSEKERN_BACKEND") != "reference":
            self.peak_lr = 1.001e-3
        return step(self, x)

    monkeypatch.setattr(sk.Trainer, "step", wrong)
    found = gpu_checks.train(TINY, CPU, 0, activation)
    assert not found.passed
    assert found.error == pytest.approx(1e-3, rel=0.1)


def test_the_encode_paths_are_set_by_the_environment_for_the_call_alone(monkeypatch):
    seen = []
    subject = gpu_kernels.Subject.build(TINY, gpu_kernels.batches(TINY, CPU, 0), False, timing.Clock(CPU))
    subject.codes(0)
    monkeypatch.setattr(gpu_kernels, "choose", lambda *_: SimpleNamespace(__name__="sparsekern.backends.triton"))
    monkeypatch.setattr(sk, "topk_encode", lambda *_: seen.append(os.environ.get("SPARSEKERN_TRITON_ENCODE")))
    kernels = gpu_kernels.encode(subject)
    for path in ("fused", "chunked"):
        kernels[f"topk_encode, {path}"].call(0)
    kernels["topk_encode"].call(0)
    assert seen == ["fused", "chunked", None]
    assert "SPARSEKERN_TRITON_ENCODE" not in os.environ


def test_matmuls_go_in_even_blocks_of_rows_that_fit(monkeypatch):
    monkeypatch.setattr(memory, "available", lambda device: 4 * 2 * 512 * 25)
    assert gpu_kernels._block(TINY, CPU) == 22  # three blocks of 22, 22 and 20 rows, none above 25
    subject = gpu_kernels.Subject.build(TINY, gpu_kernels.batches(TINY, CPU, 0), False, timing.Clock(CPU))
    gpu_kernels.encode(subject)["matmul and torch.topk"].call(3)


def test_a_kernel_that_raises_is_recorded_and_the_others_are_timed():
    work = roofs.matmul(TINY)

    def broken(turn):
        raise torch.OutOfMemoryError("tried to allocate 9 TiB\nand more")

    kernels = {"good": gpu_kernels.Kernel(lambda turn: None, work), "bad": gpu_kernels.Kernel(broken, work, "good")}
    measured, failed = gpu_kernels.measure(kernels, timing.Clock(CPU), ROOFS, turns=4, seconds=9)
    assert failed == {"bad": "out of memory: tried to allocate 9 TiB"}
    assert (list(measured), measured["good"]["samples"]) == (["good"], 4)


def test_calls_take_turns_with_different_batches_until_the_time_is_over():
    log = []
    clock = timing.Clock(CPU)
    calls = {"a": lambda turn: log.append(("a", turn)), "b": lambda turn: log.append(("b", turn))}
    taken = clock.by_turns(calls, turns=5, seconds=60)
    assert [name for name, _ in log] == ["a", "b", "b", "a"] * 2 + ["a", "b"]
    assert [turn for _, turn in log] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert {name: len(samples) for name, samples in taken.items()} == {"a": 5, "b": 5}
    assert len(clock.by_turns(calls, turns=50, seconds=0)["a"]) == timing.FEWEST_TURNS


@pytest.mark.parametrize("data", ["zipf", "gaussian"])
def test_batches_are_different_and_follow_the_seed(data):
    case = Case(data, 64, 32, 512, 8)
    made = gpu_kernels.batches(case, CPU, 3)
    assert len(made) == gpu_kernels.BATCHES
    assert all(batch.shape == (64, 32) and batch.isfinite().all() for batch in made)
    assert not torch.equal(made[0], made[1])
    assert torch.equal(made[2], gpu_kernels.batches(case, CPU, 3)[2])
    assert not torch.equal(made[2], gpu_kernels.batches(case, CPU, 4)[2])


def test_work_without_time_or_memory_is_left_out_with_a_reason(monkeypatch):
    options = gpu.parse([*QUICK, "--parts", "kernels", "steps", "--minutes", "0.001"])
    record = gpu.Bench(options).run()
    reasons = [reason for case in record["cases"] for reason in case["skipped"].values()]
    assert len(reasons) == 2 * (6 + 2) + 2 * 3
    assert all("s, 0 are left for it" in reason and reason.startswith("would take about") for reason in reasons)
    monkeypatch.setattr(memory, "available", lambda device=CPU: 2**20)
    record = gpu.Bench(gpu.parse([*QUICK])).run()
    assert not any(case["kernels"] or case["steps"] for case in record["cases"])
    assert "needs about" in record["checks"]["skipped"]["x"]
    assert "1 are free" not in gpu_table.markdown(record)
    assert "0.0 are free" in gpu_table.markdown(record)


def test_a_budget_learns_from_what_was_done():
    budget = gpu.Budget(1)
    assert budget.expected("kernels", 5) == gpu.GUESSED_SECONDS["kernels"] + 5
    budget.took("kernels", 9, 5)
    assert budget.expected("kernels", 7) == 4 + 7
    budget.took("kernels", 1, 5)
    assert budget.expected("kernels", 7) == 4 + 7
    assert 59 < budget.left <= 60


def test_the_record_is_there_when_the_run_is_cut_short(monkeypatch, tmp_path):
    path = tmp_path / "r.json"

    def stopped(self, piece, entry):
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu.Bench, "steps", stopped)
    with pytest.raises(KeyboardInterrupt):
        gpu.main([*QUICK, "--parts", "kernels", "steps", "--output", str(path)])
    record = json.loads(path.read_text())
    assert not record["finished"]
    assert record["cases"][0]["kernels"]
    assert "the run was cut short" in gpu_table.markdown(record)


def test_pieces_come_in_order_of_importance():
    options = SimpleNamespace(shapes=gpu.SHAPES, parts=gpu.PARTS, contenders=gpu_steps.CONTENDERS)
    pieces = gpu.plan(options)
    assert [(piece.shape, piece.kind) for piece in pieces[:4]] == [
        *[("F", "kernels"), ("F", "steps"), ("A", "kernels"), ("A", "steps")]
    ]
    assert pieces[-1].what == ("torch-compile",)
    assert {(piece.shape, piece.case.data) for piece in pieces if piece.case.data == "gaussian"} == {
        *[("F", "gaussian"), ("A", "gaussian"), ("B", "gaussian")]
    }


def test_a_contender_that_runs_out_of_memory_is_tried_alone(monkeypatch):
    """The first failure makes room by letting sparsekern go; the peer's ratio then comes from medians."""
    built = []

    class Hungry(ENTRIES["torch"].kind):
        def build(self):
            built.append("torch")
            if len(built) == 1:
                raise torch.OutOfMemoryError("no room")
            super().build()

    monkeypatch.setitem(gpu_steps.RUN_BY, "torch", ENTRIES["torch"].__class__(Hungry))
    made = gpu_kernels.batches(TINY, CPU, 0)
    clock = timing.Clock(CPU)
    measured, failed = gpu_steps.measure(["sparsekern", "torch"], TINY, made, clock, turns=3, seconds=9)
    assert not failed
    assert built == ["torch"] * 2
    assert measured["torch"]["alone"]
    base = measured["sparsekern"]["step_ms"]["median"]
    assert measured["torch"]["over_sparsekern"]["median"] == measured["torch"]["step_ms"]["median"] / base

    built.clear()
    monkeypatch.setattr(Hungry, "build", lambda self: (_ for _ in ()).throw(torch.OutOfMemoryError("no room at all")))
    measured, failed = gpu_steps.measure(["sparsekern", "torch"], TINY, made, clock, turns=3, seconds=9)
    assert failed == {"torch": "out of memory: no room at all"}
    assert list(measured) == ["sparsekern"]


def test_peers_that_are_not_installed_are_left_out(monkeypatch):
    monkeypatch.setattr(gpu_steps.importlib.util, "find_spec", lambda name: None if name == "sparsify" else object())
    assert gpu_steps.absent("sparsify", CPU) == "sparsify is not installed"
    assert gpu_steps.absent("torch-compile", CPU) is None
    assert gpu_steps.absent("sparsekern-cuda", CPU) is not None


def test_contenders_train_in_bfloat16_where_they_are_asked_to():
    plain, lower = (ENTRIES["torch"].kind(TINY, 1e-3, "cpu", dtype) for dtype in (torch.float32, torch.bfloat16))
    lower.module.load_state_dict(plain.module.state_dict())
    x = torch.randn(64, 32)
    one, other = plain.step(x).item(), lower.step(x).item()
    assert one != other
    assert one == pytest.approx(other, rel=0.02)
    assert lower.W_enc.dtype == torch.float32


def test_floors_are_those_of_the_formulas():
    """The worked floors at (8192, 4096, 131072, 64), for 800 TFLOP/s and 3 TB/s: 11.0 ms of encode, 8.6 of Adam."""
    case = Case("zipf", 8192, 4096, 131072, 64)
    assert roofs.encode(case, 131072).floor_ms(ROOFS) == pytest.approx(11.0, abs=0.05)
    assert roofs.update(case).floor_ms(ROOFS) == pytest.approx(8.6 + 0.36, abs=0.2)
    assert roofs.products(case, 131072).floor_ms(ROOFS) == pytest.approx(0.76, abs=0.03)
    assert 21 < roofs.step_floor_ms(case, 131072, ROOFS) < 23
    assert roofs.encode(case, 131072, "fp8").floor_ms(ROOFS) is None
    assert roofs.encode(case, 131072, "fp8").floor_ms({**ROOFS, "fp8_flops_s": 1.4e15}) == pytest.approx(6.3, abs=0.05)
    assert roofs.gather_traffic(case) == pytest.approx(4 * 8192 * 64 * 4096, rel=0.03)


def test_targets_that_are_missed_are_bold(record):
    made = as_if_measured_on_a_gpu(record)
    first, second = made["cases"][:2]
    first["kernels"]["topk_encode"]["over"]["median"] = 1.2  # at A, where 1.15 is wanted
    second["kernels"]["topk_encode"]["over"]["median"] = 1.2  # at F, where 1.3 is
    first["steps"]["sparsify"] = {**first["steps"]["torch"], "over_sparsekern": {"low": 1, "median": 2.6, "high": 3}}
    second["steps"]["sparsify"] = {**second["steps"]["torch"], "over_sparsekern": {"low": 1, "median": 3.4, "high": 4}}
    first["steps"]["sparsekern"]["waits"] = "RuntimeError: called a synchronizing CUDA operation"
    second["steps"]["sparsekern"]["beyond_bytes"] = 3 * 96 * 1024
    seconds = roofs.gather_traffic(gpu_table.of(first)) / (0.79 * ROOFS["copy_bytes_s"])
    first["kernels"]["sparse_decode"]["ms"]["median"] = 1e3 * seconds
    rows = {row[0]: row[2:4] for row in gpu_table.targets(made).rows}
    assert rows["topk_encode ÷ cuBLAS bf16 alone"] == ["**1.20**", "1.20"]
    assert rows["sparsify's step ÷ sparsekern's"] == ["2.60", "**3.40**"]
    assert rows["steps that wait for the device"] == ["**1.00**", "0.00"]
    assert rows["memory of a step beyond its state ÷ one B × N in bf16"] == ["0.00", "**1.50**"]
    assert rows["sparse_decode: gather traffic ÷ copy"][0] == "**0.79**"
    text = gpu_table.markdown(made)
    assert "**targets (bold: missed)**" in text
    assert "made up" in text
    assert "rehearsal" not in text


def test_the_backends_own_check_counts(record):
    assert "missing" in record["checks"]["backends"]["triton"]
    entry = {"kernel": "topk_encode", "dtype": "float32", "passed": False, "error": 0.1, "bound": 1e-5}
    record["checks"]["backends"]["cuda"] = {"results": [{**entry, "seconds": 1.0, "note": "too far"}]}
    assert gpu.failed(record)
    assert "| topk_encode, float32 (cuda's own) | – | **FAILED** | 1.0e-01 |" in gpu_table.markdown(record)
    record["checks"]["backends"]["cuda"] = {"error": "RuntimeError: no kernel image"}
    assert gpu.failed(record)
    assert "cuda's own checks: error, RuntimeError: no kernel image" in gpu_table.markdown(record)


def test_the_table_command_prints_and_draws(rehearsal, tmp_path, capsys):
    gpu_table.main([str(rehearsal.path), "--plot", str(tmp_path / "roofline.png")])
    assert "kernels at x: zipf 64, 32, 512, 8" in capsys.readouterr().out
    assert (tmp_path / "roofline.png").read_bytes().startswith(b"\x89PNG")
    assert not plot.plot_roofline({"cases": []}, tmp_path / "none.png")
    other = tmp_path / "bench.json"
    other.write_text("{}")
    with pytest.raises(SystemExit):
        gpu_table.main([str(other)])


def test_a_gpu_without_a_number_is_the_current_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"Made Up {device.index}")
    options = gpu.parse(["--shapes", "F", "W"])
    assert options.device == torch.device("cuda:1")
    assert options.output == Path("bench/results/gpu_made_up_1.json")
    assert options.shapes == {"F": gpu.SHAPES["F"], "W": gpu.SHAPES["W"]}


def test_file_names_come_from_the_device():
    assert gpu.slug("NVIDIA H100 80GB HBM3") == "nvidia_h100_80gb_hbm3"


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_command_runs_on_a_gpu(tmp_path):
    path = tmp_path / "r.json"
    assert gpu.main(["--quick", "--contenders", "sparsekern", "torch", "--output", str(path)]) == 0
    record = json.loads(path.read_text())
    assert record["device_type"] == "cuda"
    assert not any(case["failed"] for case in record["cases"])
