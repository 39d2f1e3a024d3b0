"""benchmark.py: what is in a row, the comparison with the published way and the limit, tables and figures."""

import csv
import itertools
import re
import shlex
import shutil
import statistics
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
import torchvision

import benchmark
import benchmarking.worker
from benchmarking import gpu, profiling, report, results, subjects
from benchmarking.limit import PRODUCTS, best_product
from benchmarking.spec import Spec
from benchmarking.worker import Worker, WorkerError, prepare

ROOT = Path(__file__).parents[1]
TINY = shlex.split("--width_mult 0.03125 --resolutions 32 --threads 1")
SMALL = [*TINY, "--calls", "6"]


def run(*arguments):
    benchmark.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The rows of a small run, as they lie in the file."""
    pytest.importorskip("onnxscript")
    path = tmp_path_factory.mktemp("results") / "small.csv"
    run(
        "--models", "vanillanet_5", "vanillanet_8", "--runtimes", "eager", "onnxruntime", "--precisions", "fp32",
        "--together", 2, *SMALL, "--output", path,
    )  # fmt: skip
    return path


def test_a_row_says_what_was_measured_and_where(measured):
    with measured.open(newline="") as file:
        header = next(csv.reader(file))
    assert tuple(header) == results.COLUMNS
    rows = results.read(measured)
    assert [(row["network"], row["engine"], row["batch"]) for row in rows] == [
        (network, engine, 1) for network in ("vanillanet_5", "vanillanet_8") for engine in ("eager", "onnxruntime")
    ]
    assert {row["network"]: row["layers"] for row in rows} == {"vanillanet_5": 5, "vanillanet_8": 8}
    for row in rows:
        assert row["p5_ms"] <= row["median_ms"] <= row["p95_ms"]
        assert row["calls"] == 10  # whole turns of five
        assert row["images_per_s"] == pytest.approx(1e3 * row["batch"] / row["median_ms"], rel=1e-3)
        assert row["gflops"] == pytest.approx(2 * row["macs_g"] * row["batch"] / row["median_ms"] * 1e3, rel=1e-3)
        assert row["share"] == pytest.approx(row["gflops"] / row["limit_gflops"], rel=1e-3)
        assert row["threads"] == 1
        assert row["peak_mb"] > 50
        assert row["first_s"] > 0
        assert row["processor"]
        assert row["torch"]
        assert row["library"].startswith("torch" if row["engine"] == "eager" else "onnxruntime ")
        base = next(
            other["median_ms"]
            for other in rows
            if (other["network"], other["batch"], other["engine"]) == (row["network"], row["batch"], "eager")
        )
        assert row["ratio"] == pytest.approx(base / row["median_ms"], rel=1e-3)


def test_rows_that_were_there_stay(measured, tmp_path, monkeypatch):
    before = results.read(measured)
    monkeypatch.setattr(benchmark, "measure", lambda args: iter([[{**before[0], "precision": "bf16", "ratio": None}]]))
    path = tmp_path / "kept.csv"
    path.write_text(measured.read_text())
    run("--models", "vanillanet_5", "--output", path)
    assert results.read(path) == [*before, {**before[0], "precision": "bf16", "ratio": None}]


class FakeWorker:
    """Takes the place of the processes that measure the anchor and the limit."""

    def __init__(self, *args, **options):
        pass

    def ready(self):
        return {}

    def close(self):
        pass


def test_an_interrupted_run_keeps_the_networks_that_are_done(measured, tmp_path, monkeypatch):
    done = results.read(measured)

    def groups():
        yield done[:2]
        raise KeyboardInterrupt

    each = groups()
    monkeypatch.setattr(benchmark, "Worker", FakeWorker)
    monkeypatch.setattr(benchmark, "_start", lambda *args: {})
    monkeypatch.setattr(benchmark, "_measure_group", lambda *args: next(each))
    path = tmp_path / "interrupted.csv"
    results.write(path, done[3:])
    with pytest.raises(KeyboardInterrupt):
        run("--models", "vanillanet_5", "vanillanet_8", "--output", path)
    kept = results.read(path)
    assert [(row["network"], row["engine"], row["median_ms"]) for row in kept] == [
        (row["network"], row["engine"], row["median_ms"]) for row in (done[3], *done[:2])
    ]
    assert kept[1]["ratio"] == 1


def test_report_from_the_file(measured, tmp_path, capsys):
    rows = results.read(measured)
    rows += [{**row, "batch": 3, "median_ms": 2 * row["median_ms"]} for row in rows]
    rows += [{**row, "resolution": 64, "median_ms": 3 * row["median_ms"]} for row in rows[:2]]
    results.write(tmp_path / "more.csv", rows)
    run("--report", tmp_path / "more.csv", "--docs", tmp_path / "page.md", "--figures", tmp_path)
    printed = capsys.readouterr().out
    assert "inference on cpu, 32 px, batch 3" in printed
    rows = results.read(tmp_path / "more.csv")
    for row in rows:
        line = (
            rf"\| {row['network']} +\| {row['engine']} +\| fp32 +\| +{row['layers']:.0f} \|.* {row['median_ms']:.2f} "
        )
        assert re.search(line, printed)
    page = (tmp_path / "page.md").read_text()
    assert "1 threads" in page
    figures = {path.name for path in tmp_path.glob("*.png")}
    assert figures == {f"measured_more_{name}.png" for name in report.FIGURES}
    assert len(figures) == 2
    assert all(f"]({name})" in page for name in figures)
    run("--report", tmp_path / "more.csv", "--docs", tmp_path / "page.md")
    assert "](measured" not in (tmp_path / "page.md").read_text()  # no figure was drawn


@pytest.mark.slow
def test_training_steps(tmp_path):
    path = tmp_path / "training.csv"
    run(
        "--models", "vanillanet_5", "--training", "true", "--batches", 4, "--precisions", "fp32", "bf16", *SMALL[:-4],
        "--calls", 2, "--threads", 1, "--output", path,
    )  # fmt: skip
    rows = results.read(path)
    assert [(row["engine"], row["precision"]) for row in rows] == [
        (engine, precision) for engine in benchmark.TRAINING_ENGINES for precision in ("fp32", "bf16")
    ]
    assert {row["kind"] for row in rows} == {"training"}
    assert {row["layers"] for row in rows} == {10}  # train form: two convolutions a layer
    assert rows[0]["ratio"] == 1
    assert all(row["gflops"] == pytest.approx(6 * 4 * row["macs_g"] / row["median_ms"] * 1e3, rel=1e-3) for row in rows)


@pytest.mark.parametrize("mode", ["none", "full"])
def test_the_memory_in_a_row_is_that_counted_by_hand(mode):
    """VanillaNet-5 in float32 with 16, 32, 64 and 128 channels: numbers of 4 bytes, and pools' indices of 8."""
    stem, *stages = (channels * side**2 for channels, side in ((16, 56), (32, 28), (64, 14), (128, 7)))
    numbers = 3 * 224**2 + 128 + 3 * 1000  # the images; what the classifier's layers take, and BatchNorm's input
    if mode == "full":
        numbers += stem + sum(stages[:-1])  # what the stages take
    else:
        # Each part's input is counted as the output of the one before, the last one's is pooled and not kept. BatchNorm
        # and convolutions keep inputs, ReLU its output, LeakyReLU and pools their inputs; a pool's output is ReLU's
        # input alone.
        numbers += 7 * stem
        for before, after in itertools.pairwise([stem, *stages]):
            wide = 4 * after  # before the pool
            numbers += 3 * before + 2 * wide + 3 * after + 2 * after
        numbers -= stages[-1]
    spec = Spec("vanillanet_5", "channels_last", "fp32", kind="training", width_mult=1 / 32, grad_checkpointing=mode)
    costs = subjects.costs(spec)
    assert costs["saved_mib"] * 2**20 == 4 * numbers
    assert costs["step_mib"] > costs["saved_mib"]


@pytest.mark.slow
def test_a_network_that_an_engine_cannot_run_is_named_and_left_out(capsys):
    pytest.importorskip("onnxscript")
    run("--models", "resnet10t", "eva02_tiny_patch14_224", "--runtimes", "eager", "--precisions", "fp32",
        "--resolutions", 32, "--calls", 2, "--threads", 1)  # fmt: skip
    printed = capsys.readouterr().out
    assert "left out: eva02_tiny_patch14_224, eager, fp32, 32 px, batch 1: " in printed
    assert "resnet10t, eager, fp32, 32 px, batch 1: " in printed


def test_profile(capsys):
    run("--models", "vanillanet_5", "--runtimes", "eager", "--precisions", "fp32", "--profile", "true", *TINY)
    printed = capsys.readouterr().out
    assert "convolution" in printed
    shares = [float(line.split("|")[3]) for line in printed.splitlines() if line.startswith("| aten")]
    assert 90 < sum(shares) < 100.1


# -- parts


def test_turns_are_interleaved():
    seen = []

    def take(name):
        seen.append(name)
        return [len(seen)]

    found = profiling.interleave([lambda: take("a"), lambda: take("b"), lambda: take("c")], rounds=4, warm_up=1)
    assert [sorted(seen[i : i + 3]) for i in range(0, 15, 3)] == [["a", "b", "c"]] * 5
    assert len({tuple(seen[i : i + 3]) for i in range(0, 15, 3)}) > 1  # in changing order
    assert [len(values) for values in found] == [4, 4, 4]
    assert min(map(min, found)) == 4  # the first round does not count


def test_statistics():
    seconds = [0.001 * i for i in range(1, 102)]
    found = results.statistics(seconds, batch=2)
    assert found["median_ms"] == pytest.approx(51)
    assert (found["p5_ms"], found["p95_ms"]) == pytest.approx((6, 96))
    assert found["mean_ms"] == pytest.approx(1e3 * statistics.mean(seconds))
    assert found["images_per_s"] == pytest.approx(2000 / 51)


def test_the_comparison():
    rows = [
        {"kind": "inference", "network": network, "engine": engine, "precision": precision, "device": "cpu",
         "resolution": 224, "batch": 1, "median_ms": ms, "macs_g": 10.0}
        for network, engine, precision, ms in (
            ("a", "eager", "fp32", 100.0), ("a", "openvino", "int8", 12.5), ("a", "eager", "bf16", 50.0),
            ("b", "openvino", "fp32", 80.0),
        )
    ]  # fmt: skip
    results.complete(rows, {"fp32": 400.0, "int8": 2000.0})
    assert [row["ratio"] for row in rows] == [1.0, 8.0, 2.0, None]
    assert [row["gflops"] for row in rows] == [200.0, 1600.0, 400.0, 250.0]
    assert [row["share"] for row in rows] == [0.5, 0.8, None, 0.625]


def test_published_accuracies_are_the_published_ones():
    names = report.published()
    assert names["vanillanet_5"] == ("VanillaNet-5", 72.49)
    assert names["vanillanet_13_x1_5_ada_pool"] == ("VanillaNet-13-1.5x, adaptive pooling", 83.11)
    weights = torchvision.models.ResNet18_Weights.IMAGENET1K_V1
    assert names["resnet18"] == ("ResNet-18", weights.meta["_metrics"]["ImageNet-1K"]["acc@1"])
    assert {name for name in names if report.is_vanillanet(name)} == set(benchmark.timm.list_models("vanillanet*"))
    assert set(report.PEERS) <= set(names)


def test_the_figure_shows_networks_as_published_in_their_fastest_engine():
    rows = results.read(ROOT / "results" / "cpu-avx2.csv")
    assert any(row["network"] == "vanillanet_11 (built deployed)" for row in rows)
    panels = report.accuracy_panels(rows)
    single = [row for row in rows if (row["resolution"], row["batch"]) == (224, 1) and " (" not in row["network"]]
    for panel, fits in (("float32", {"fp32"}), ("fastest precision of each", {"fp32", "int8"})):
        drawn = {one.network: one.latency_ms for one in panels[panel] if "published" not in one.series}
        assert len(drawn) == 11 + 7  # variants, and the peers whose accuracy is known
        for name, (words, top1) in report.published().items():
            times = [row["median_ms"] for row in single if row["network"] == name and row["precision"] in fits]
            assert drawn.get(words) == (min(times) if top1 else None)


def test_a_gpus_figure_and_tables_begin_with_what_torch_does_by_default():
    """The rows of a CPU as a GPU would have them: `default` is the published way there, and fp32 is another one."""
    rows = results.read(ROOT / "results" / "cpu-avx2.csv")
    rows = [row | {"device": "cuda", "precision": row["precision"].replace("fp32", "default")} for row in rows]
    panels = report.accuracy_panels(rows)
    assert {one.network for one in panels["float32"]} >= {"VanillaNet-11", "ResNet-50"}
    assert any("published way" in one.series for one in panels["float32"])
    hero = next(row for row in rows if row["network"] == "vanillanet_11" and row["engine"] == "eager")
    table = report.speed_table([hero, hero | {"precision": "fp32", "median_ms": 2 * hero["median_ms"], "ratio": 0.5}])
    assert [cell.rpartition("<br>")[2] for cell in table[1][1:]] == [f"**{report._ms(hero['median_ms'])}**", "0.5x"]


def test_the_same_row_twice_is_the_later_one():
    row = next(row for row in results.read(ROOT / "results" / "cpu-avx2.csv") if row["network"] == "vanillanet_11")
    later = row | {"median_ms": 2 * row["median_ms"]}
    assert report.speed_table([row, later]) == report.speed_table([later])


def test_files_of_one_name_are_refused(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        shutil.copy(ROOT / "results" / "training.csv", tmp_path / name / "cpu.csv")
    with pytest.raises(SystemExit):
        run("--report", tmp_path / "a" / "cpu.csv", tmp_path / "b" / "cpu.csv")
    assert "two files alike" in capsys.readouterr().err


def test_a_command_that_was_run_twice_draws_one_line():
    rows = results.read(ROOT / "results" / "cpu-avx2.csv")
    assert report.varied([*rows, *rows], "batch") == report.varied(rows, "batch")
    once = [row for row in rows if row["batch"] == 1]
    assert report.varied([*once, *once], "batch") == []


def test_a_checkpoint_with_brackets_is_a_network_of_its_own():
    row = next(row for row in results.read(ROOT / "results" / "cpu-avx2.csv") if row["engine"] == "eager")
    rows = [row | {"network": name, "median_ms": ms} for name, ms in (("net", 10.0), ("net (1)", 40.0))]
    results.complete(rows, {})
    assert [row["ratio"] for row in rows] == [1.0, 1.0]
    assert len(report.single(rows)) == 2


def test_guarded_steps_are_not_in_the_table_of_memory():
    rows = results.read(ROOT / "results" / "checkpointing.csv")
    guarded = [row | {"network": f"{row['network']} (guarded)"} for row in rows]
    assert report.memory_table([*rows, *guarded]) == report.memory_table(rows)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_the_limit_is_a_rate(monkeypatch, precision):
    """On a clock that moves by 1 ms a reading: 2 n^3 operations in each millisecond, best for the largest n."""
    now = iter(range(10**6))
    monkeypatch.setattr("benchmarking.limit.time.perf_counter", lambda: next(now) / 1e3)
    monkeypatch.setattr("benchmarking.limit.SIZES", {"cpu": (32, 64)})
    monkeypatch.setattr("benchmarking.limit.SLOW", 10)  # by this clock all products take equally long
    assert best_product(precision) == pytest.approx(2 * 64**3 / 1e-3 / 1e9)


def test_a_kernel_that_is_a_plain_loop_is_given_up(monkeypatch):
    """At the smallest size, in which it is fastest here; the other goes on to the largest."""
    now, calls = [0.0], []

    def products(size, device):
        def kernel(name, rate):
            def product():
                calls.append((name, size))
                now[0] += 2 * size**3 / 1e9 / rate

            return product

        return [kernel("loop", 1e-7), kernel("fast", 1.0)]

    monkeypatch.setattr("benchmarking.limit.time.perf_counter", lambda: now[0])
    monkeypatch.setattr("benchmarking.limit.SIZES", {"cpu": (64, 128)})
    monkeypatch.setitem(PRODUCTS, "int8", products)
    assert best_product("int8") == pytest.approx(1.0)
    assert set(calls) == {("loop", 8), ("fast", 8), ("fast", 64), ("fast", 128)}


FILES = ("cpu-avx2", "cpu-avx512", "cpu-amx", "training")


def test_the_committed_page_is_made_from_the_committed_results(tmp_path):
    docs = ROOT / "docs"
    sections = {name: results.read(ROOT / "results" / f"{name}.csv") for name in FILES}
    report.write_page(tmp_path / "benchmark.md", sections, figures=[path.name for path in docs.glob("measured_*.png")])
    page = (docs / "benchmark.md").read_text()
    assert (tmp_path / "benchmark.md").read_text() == page
    drawn = {f"measured_{label}_accuracy.png" for label in FILES[:3]} | {"measured_cpu-avx2_sizes.png"}
    assert {path.name for path in docs.glob("measured_*.png")} == drawn == set(re.findall(r"\]\((.*png)\)", page))


def section(name):
    """The part of the page that is about a file, and the file's rows as they are, without this project's reader."""
    page = (ROOT / "docs" / "benchmark.md").read_text()
    (part,) = (part for part in page.split("\n## ") if f"`{name}.csv`" in part)
    with (ROOT / "results" / f"{name}.csv").open(newline="") as file:
        return part, list(csv.DictReader(file))


@pytest.mark.parametrize("name", FILES)
def test_each_cell_of_the_page_is_in_its_file(name):
    part, rows = section(name)
    rows = [row for row in rows if " (" not in row["network"] and row["batch"] in ("1", "8")]
    rows = [row for row in rows if row["resolution"] == "224" and (row["batch"] == "1" or row["kind"] == "training")]
    header, _, *lines = (line.strip("| ").split(" | ") for line in part.splitlines() if line.startswith("| "))
    words = {"float32": "fp32", "bfloat16": "bf16", "int8": "int8"}
    engines = {words: engine for engine, words in report.ENGINES.items() if engine != "plain" or name == "training"}
    networks = {words: key for key, (words, _) in report.published().items()}
    compared = 0
    for cells in lines:
        network, *cells = (cells + [""] * len(header))[: len(header)]
        for column, cell in zip(header[1:], cells, strict=True):
            engine, precision = column.split("<br>")
            found = [
                row for row in rows
                if (row["network"], row["engine"], row["precision"])
                == (networks[network], engines[engine], words[precision])
            ]  # fmt: skip
            if not cell.strip():
                assert not found
                continue
            (row,) = found
            median, _, ratio = cell.partition("<br>")
            assert float(median.strip("* ")) == pytest.approx(float(row["median_ms"]), rel=6e-3)
            times = [float(other["median_ms"]) for other in rows if other["network"] == row["network"]]
            assert median.startswith("**") == (float(row["median_ms"]) == min(times))
            assert not ratio or float(ratio.removesuffix("x")) == pytest.approx(float(row["ratio"]), abs=0.051)
            compared += 1
    assert compared == len(rows)


@pytest.mark.parametrize("name", FILES[:3])
def test_each_statement_of_the_page_follows_from_its_file(name):
    part, rows = section(name)
    rows = [
        row for row in rows
        if row["network"].startswith("vanillanet") and (row["resolution"], row["batch"]) == ("224", "1")
        and " (" not in row["network"]
    ]  # fmt: skip

    def best(precision, network, torch_alone=False):
        chosen = [
            row for row in rows
            if (row["network"], row["precision"]) == (network, precision)
            and (not torch_alone or row["library"].startswith("torch"))
        ]  # fmt: skip
        return min(chosen, key=lambda row: float(row["median_ms"]), default=None)

    names = {row["network"] for row in rows}
    for precision, words in (("fp32", "float32"), ("bf16", "bfloat16"), ("int8", "int8")):
        row = best(precision, "vanillanet_11")
        if row is None:
            assert words not in part
            continue
        stated = re.search(rf"([0-9.]+) ms in {words} \(([^)]*)\)", part)
        assert float(stated.group(1)) == pytest.approx(float(row["median_ms"]), rel=6e-3)
        assert stated.group(2) == report.ENGINES[row["engine"]]
        lags = [
            float(alone["median_ms"]) / float(best(precision, network)["median_ms"])
            for network in names
            if (alone := best(precision, network, torch_alone=True))
        ]
        assert f" {statistics.median(lags):.2f} times in {words}" in part
        beside = re.search(r"stands beside the best engines in ([^:]*?)(, but not in ([^:]*))?:", part)
        assert (words in beside.group(1)) == (statistics.median(lags) <= 1.2)
        shares = [float(row["share"]) for network in names if (row := best(precision, network)) and row["share"]]
        assert f"{min(shares):.2f} to {max(shares):.2f} in {words}" in part
    base = next(row for row in rows if (row["network"], row["ratio"]) == ("vanillanet_11", "1"))
    assert f"takes {float(base['median_ms']):.0f} ms. Plain" in part


def test_what_the_page_on_measuring_states_is_in_the_file():
    page = " ".join((ROOT / "docs" / "measuring.md").read_text().split())
    rows = [row for row in section("cpu-avx2")[1] if (row["resolution"], row["batch"]) == ("224", "1")]
    ms = {(row["network"], row["engine"], row["precision"]): float(row["median_ms"]) for row in rows}
    plain, quantized, twin = (f"vanillanet_11{suffix}" for suffix in ("", " (depthwise in int8)", " (built deployed)"))
    torch_before, torch_after = (ms[name, "aotinductor", "int8"] for name in (plain, quantized))
    intel_before, intel_after = (ms[name, "openvino", "int8"] for name in (plain, quantized))
    assert (
        f"save {100 * (1 - torch_after / torch_before):.0f} % of VanillaNet-11's time in `aotinductor` "
        f"({torch_before:.0f} to {torch_after:.0f} ms) and {100 * (1 - intel_after / intel_before):.0f} % in OpenVINO "
        f"({intel_before:.0f} to {intel_after:.0f} ms)"
    ) in page
    fused = {
        key: ms[plain, *key] / ms[twin, *key]
        for key in itertools.product(report.ENGINES, ("fp32", "int8"))
        if (twin, *key) in ms
    }
    assert (
        f"{fused['aotinductor', 'fp32']:.2f} in float32 and {fused['aotinductor', 'int8']:.2f} in int8 with "
        f"`aotinductor`, {fused['onnxruntime', 'fp32']:.2f} and {fused['onnxruntime', 'int8']:.2f} with ONNX Runtime, "
        f"{fused['openvino', 'fp32']:.2f} and {fused['openvino', 'int8']:.2f} with OpenVINO"
    ) in page
    steps = {row["engine"]: float(row["median_ms"]) / 1e3 for row in section("training")[1]}
    assert (
        f"{steps['plain']:.1f} s in float32, contiguous or channels-last, and {steps['compile']:.1f} s compiled" in page
    )
    assert f"{steps['plain']:.1f}" == f"{steps['channels_last']:.1f}"


def test_what_the_page_on_int8_states_of_depthwise_convolutions_is_in_the_file():
    page = (ROOT / "docs" / "int8.md").read_text()
    ratios = {"amx": [], "avx512": []}
    for depth, (engine, words) in itertools.product(
        (6, 11), (("aotinductor", "`aotinductor`"), ("openvino", "OpenVINO"))
    ):
        cells = []
        for processor, found in ratios.items():
            rows = results.read(ROOT / "results" / f"int8-{processor}.csv")
            ms = {(row["network"], row["engine"]): row["median_ms"] for row in rows}
            before, after = (ms[f"vanillanet_{depth}{suffix}", engine] for suffix in ("", " (depthwise in int8)"))
            found.append(after / before)
            cells += [f"{before:.1f}", f"{after:.1f}", f"{after / before:.2f}"]
        assert f"| VanillaNet-{depth}, {words} | {' | '.join(cells)} |" in page
    least, most = (100 * (1 - ratio) for ratio in (max(ratios["amx"]), min(ratios["amx"])))
    assert f"With AMX it saves {least:.0f} to {most:.0f} % of the time." in page
    assert f"With AVX-512 it saves {100 * (1 - min(ratios['avx512'])):.0f} % at most." in page


def test_the_page_on_training_says_which_batch_fits():
    """Against the file as it is: each batch fits its card by the formula of the page, and one image more does not."""
    with (ROOT / "results" / "checkpointing.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    table = report._markdown(report.memory_table(results.read(ROOT / "results" / "checkpointing.csv")))
    assert table in (ROOT / "docs" / "training.md").read_text()
    header, _, *lines = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines())
    assert len(lines) == len(rows) == 4 * 3
    base = {}
    for row, (label, time, saved, peak, *batches) in zip(rows, lines, strict=True):
        network, _, mode = row["network"].partition(" (checkpointing ")
        assert label == f"{report.published()[network][0]}, {mode.strip(')') or 'none'}"
        base.setdefault(network, float(row["median_ms"]))
        assert float(time) == pytest.approx(float(row["median_ms"]) / base[network], abs=0.006)
        assert (float(saved), float(peak)) == pytest.approx((float(row["saved_mib"]), float(row["step_mib"])), abs=0.06)
        for card, batch in zip(header[4:], map(int, batches), strict=True):
            free = 0.9e9 * int(card.removesuffix(" GB")) - 26e6 * float(row["params_m"])
            assert batch <= free / 2**20 / float(row["step_mib"]) < batch + 1


def test_a_network_that_ends_the_process_does_not_take_others_along(tmp_path, monkeypatch):
    started = []

    class Dying:
        def __init__(self, spec, folder, *, threads):
            started.append(spec)

        def ready(self):
            pass

        def ask(self, request):
            if request["network"] == "deadly":
                raise WorkerError("the process died with code 9")

        def close(self):
            pass

    monkeypatch.setattr(benchmarking.worker, "Worker", Dying)
    specs = [Spec(name, "openvino", "fp32") for name in ("vanillanet_5", "deadly", "vanillanet_6", "vanillanet_7")]
    assert prepare([*specs, *specs], tmp_path, threads=1) == {specs[1]: "the process died with code 9"}
    assert len(started) == 2


def test_a_process_that_cannot_says_why(tmp_path):
    spec = Spec("vanillanet_5", "openvino", "int7", 32, width_mult=1 / 32)
    (reason,) = prepare([spec], tmp_path, threads=1).values()
    assert "int7" in reason
    with (
        closing(Worker(Spec("vanillanet_5", "nosuch", "fp32", 32), tmp_path, threads=1)) as worker,
        pytest.raises(WorkerError, match="there is no engine nosuch"),
    ):
        worker.ready()


# -- refusals


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("", "--model"),
        ("--models vanillanet_5 --runtimes nosuch", "'nosuch'"),
        ("--models vanillanet_5 --runtimes tensorrt", "does not run on cpu"),
        ("--models vanillanet_5 --runtimes onnxruntime --precisions bf16", "--precision"),
        ("--models resnet18 --width_mult 0.5", "--width_mult"),
        ("--report gone.csv", "gone.csv"),
        ("--report gone.csv --calls 3", "--calls"),
        ("--models vanillanet_5 --profile true --docs page.md", "--docs"),
        ("--models vanillanet_5 --profile true --output out.csv", "--output"),
        ("--models vanillanet_5 --training true --runtimes eager", "--engine"),
        ("--models vanillanet_5 --training true --precisions fp32 int8", "fp32 and bf16"),
        ("--models a/checkpoint-last.pth b/checkpoint-last.pth", "both be called checkpoint-last"),
        ("--models vanillanet_5 --device gpu", "--device gpu"),
        ("--models vanillanet_5 --training true --device mps", "--device mps"),
        ("--models vanillanet_5 --docs page.md", "--output"),
        ("--models resnet18 --twins true", "--twins"),
        ("--models resnet18 --int8_depthwise true", "--int8_depthwise"),
        ("--models a/checkpoint-last.pth --training true", "leave out a/checkpoint-last.pth"),
    ],
)
def test_bad_requests(capsys, arguments, named):
    with pytest.raises(SystemExit) as ended:
        run(*shlex.split(arguments))
    lines = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2
    assert len(lines) == 1
    assert named in lines[0]


@pytest.mark.parametrize(
    ("recipe", "arguments"),
    [
        ("--loading true", "--report x.csv"),
        ("--profile true", "--report x.csv"),
        ("--training true", "--model vanillanet_5 --profile true"),
        ("--grad_checkpointing none full", "--model vanillanet_5"),
    ],
)
def test_what_is_passed_over_in_a_recipe_has_no_effect(tmp_path, capsys, recipe, arguments):
    (tmp_path / "x.args").write_text(recipe)
    args = benchmark.build_parser().parse_args([f"@{tmp_path / 'x.args'}", *arguments.split()])
    flag = recipe.split()[0].removeprefix("--")
    assert f"--{flag} of a recipe is passed over" in capsys.readouterr().err
    assert getattr(args, flag) == args.defaults[flag]


def test_a_table_of_something_else(tmp_path, capsys):
    (tmp_path / "other.csv").write_text("epoch,loss\n1,2\n")
    with pytest.raises(SystemExit):
        run("--report", tmp_path / "other.csv")
    assert "no column kind" in capsys.readouterr().err


# -- what `make gpu` does


def test_no_module_needs_the_packages_that_a_gpu_machine_may_lack():
    """All are imported in a process where these cannot be. What they import lies where Python looks for it already."""
    missing = [
        "terminaltables",
        "tensorboardX",
        "pycocotools",
        "tensorrt",
        "openvino",
        "onnx",
        "onnxruntime",
        "torchao",
    ]
    program = (
        "import importlib, pathlib, sys\n"
        "path = list(sys.path)\n"
        f"sys.modules.update(dict.fromkeys({missing}))\n"
        "for file in sorted(pathlib.Path('.').rglob('*.py')):\n"
        "    if file.parts[0] not in ('.venv', 'docs', 'outputs', 'tests', 'hubconf.py'):\n"
        "        name = '.'.join(file.with_suffix('').parts).removesuffix('.__init__')\n"
        "        importlib.import_module(name)\n"
        "        print(name)\n"
        "assert sys.path == path\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=gpu.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]
    assert {"benchmarking.gpu", "object_detection.coco", "records.logs", "main"} <= set(done.stdout.split())


TOY = gpu.Plan(
    device="cpu", first=("vanillanet_5",), rest=(), compiled=(), packaged=(), trained=("vanillanet_5",),
    precisions=("fp32",), recipe="fp32", resolution=64, width_mult=0.03125, batch=2, calls=3, steps=2,
)  # fmt: skip


def test_a_gpus_first_ten_minutes_begin_with_what_matters():
    specs = list(gpu.Plan().specs())
    assert list(dict.fromkeys(spec.network for spec in specs))[:6] == [
        *("vanillanet_5", "vanillanet_9", "vanillanet_13", "resnet50", "swin_tiny_patch4_window7_224"),
        "vanillanet_11",
    ]
    found = [(spec.engine, spec.precision) for spec in specs if spec.network == "vanillanet_5"]
    every = ("default", "tf32", "bf16", "fp16")
    assert found[:19] == [
        *((engine, precision) for engine in ("eager", "channels_last", "cuda_graphs") for precision in every),
        *((engine, precision) for engine in ("compile", "compile_cuda_graphs") for precision in ("tf32", "bf16")),
        *(("triton", precision) for precision in ("tf32", "bf16", "fp16")),
    ]
    training = [spec for spec in specs if spec.kind == "training"]
    assert [spec.batch for spec in training] == [128] * 24
    assert [str(spec) for spec in training[:8]] == [
        "vanillanet_5, plain, default, 224 px, batch 128",
        "vanillanet_5, plain, fp16, 224 px, batch 128",
        "vanillanet_5 (guarded), plain, fp16, 224 px, batch 128",
        "vanillanet_5, channels_last, bf16, 224 px, batch 128",
        "vanillanet_5 (checkpointing activations), channels_last, bf16, 224 px, batch 128",
        "vanillanet_5 (checkpointing full), channels_last, bf16, 224 px, batch 128",
        "vanillanet_5 (guarded), channels_last, bf16, 224 px, batch 128",
        "vanillanet_5, compile, bf16, 224 px, batch 128",
    ]
    # The published recipe trains so.
    recipe = Path(gpu.ROOT, "recipes", "vanillanet_5.args").read_text()
    assert "channels_last" not in recipe
    assert {"--use_amp true", "--batch_size 128 --epochs 300 --decay_epochs 100"} <= set(recipe.splitlines())


def test_a_gpu_is_measured_row_by_row_and_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    """On the CPU, the same code."""
    monkeypatch.setattr(gpu, "GUARD_STEPS", 10)
    monkeypatch.setattr(gpu.Walk, "tests", lambda self: None)
    path = tmp_path / "gpu.csv"
    walk = gpu.Walk(TOY, path)
    walk.run()
    rows = results.read(path)
    assert [(row["network"], row["engine"]) for row in rows if row["kind"] == "inference"] == [
        ("vanillanet_5", "eager"), ("vanillanet_5", "channels_last"),
    ]  # fmt: skip
    assert [row["kind"] for row in rows].count("training") == 6
    eager = next(row for row in rows if row["engine"] == "eager")
    # As torch counts them: 5 convolutions, 4 activations' depthwise convolutions.
    assert eager["kernels"] > 9
    assert eager["event_ms"] == pytest.approx(eager["median_ms"], rel=0.2)
    assert eager["ratio"] == 1
    assert walk.problems == []
    assert "host memory grew by" in capsys.readouterr().out
    assert "convolution" in (tmp_path / "gpu-profile.txt").read_text()

    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:-2]) + "\n")
    again = gpu.Walk(TOY, path)
    monkeypatch.setattr(
        again, "measure", lambda spec, anchor, was=again.measure: done.append(spec) or was(spec, anchor)
    )
    # These have rows of their own nowhere, and were made above.
    monkeypatch.setattr(again, "profile", lambda spec: "")
    monkeypatch.setattr(again, "guarded", lambda spec: None)
    done = []
    again.run()
    assert [spec.label for spec in done] == [row["network"] for row in rows[-2:]]
    kept = [row["median_ms"] for row in results.read(path)[:-2]]
    assert kept == [row["median_ms"] for row in rows[:-2]]


def test_wrong_logits_end_a_gpus_run_with_an_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "GUARD_STEPS", 10)
    monkeypatch.setattr(gpu.Walk, "tests", lambda self: None)
    monkeypatch.setattr(gpu, "DRY", TOY)
    monkeypatch.setattr(gpu, "TOLERANCES", {"fp32": 1e-12})
    monkeypatch.setattr(gpu.Walk, "has", lambda self, spec: spec.kind == "training")  # measured above
    with pytest.raises(SystemExit) as ended:
        gpu.main(["--dry", "true", "--output", str(tmp_path / "gpu.csv")])
    assert ended.value.code == 1
    assert "does not hold: vanillanet_5, eager, fp32, 64 px, batch 1: the logits differ" in capsys.readouterr().err


def test_without_a_gpu_one_line_names_the_dry_run(capsys, monkeypatch):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        gpu.main([])
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        "benchmarking.gpu: error: torch finds no GPU here: --dry true (make gpu DRY=1) walks through it on the CPU\n"
    )


def gpu_row(engine, ms, *, network="x", precision="bf16", share=0.5, params_m=50.0, anchor_ms=1.0):
    return {
        "kind": "inference", "network": network, "engine": engine, "precision": precision, "median_ms": ms,
        "share": share, "params_m": params_m, "anchor_ms": anchor_ms,
    }  # fmt: skip


def test_what_cannot_be_of_a_gpus_times_is_named():
    copies = {"kind": "machine", "network": "copy (GB/s)", "engine": "torch", "precision": "", "gflops": 1000.0}
    possible = [copies, gpu_row("channels_last", 0.3), gpu_row("cuda_graphs", 0.1), gpu_row("triton", 0.07)]
    assert gpu.check(possible, cache_bytes=40_000_000) == []
    # 100 MB of weights, of which the cache may hold 40: 60 MB at 1000 GB/s take 0.06 ms.
    for row, said in (
        (gpu_row("triton", 0.059), "x, triton, bf16: 0.059 ms, and reading the weights takes 0.060 ms"),
        (gpu_row("triton", 0.2, share=1.01), "x, triton, bf16: 1.01 of the limit, which is more than there is"),
        (gpu_row("cuda_graphs", 0.31), "x, bf16: 0.310 ms as a CUDA graph, and 0.300 ms launch by launch"),
        (
            gpu_row("triton", 0.2, anchor_ms=1.11),
            "the anchor moved from 1.000 to 1.110 ms: the clock is not steady",
        ),
    ):
        assert gpu.check([*possible, row], cache_bytes=40_000_000) == [said]
