"""benchmark.py: what is in a row, the comparison with the published way and the limit, tables and figures."""

import csv
import shlex
import statistics
from pathlib import Path

import pytest
import torchvision

import benchmark
from benchmarking import profiling, report, results
from benchmarking.limit import PRODUCTS, best_product
from benchmarking.spec import Spec
from benchmarking.worker import Worker, WorkerError, closing, prepare

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
    page = (tmp_path / "page.md").read_text()
    rows = results.read(tmp_path / "more.csv")
    for row in rows:
        line = f"| {row['network']} | {row['engine']} | fp32 | {row['layers']:.0f} |"
        assert any(text.startswith(line) and f" {row['median_ms']:.2f} " in text for text in page.splitlines())
    assert "Threads: 1" in page
    figures = {path.name for path in tmp_path.glob("*.png")}
    assert figures == {f"measured_{name}.png" for name in report.FIGURES}
    assert len(figures) == 4
    assert all(f"]({name})" in page for name in figures)


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
    benchmark.complete(rows, {"fp32": 400.0, "int8": 2000.0})
    assert [row["ratio"] for row in rows] == [1.0, 8.0, 2.0, None]
    assert [row["gflops"] for row in rows] == [200.0, 1600.0, 400.0, 250.0]
    assert [row["share"] for row in rows] == [0.5, 0.8, None, 0.625]


def test_published_accuracies_are_the_published_ones():
    top1 = report.published_top1()
    assert (top1["vanillanet_5"], top1["vanillanet_13_x1_5_ada_pool"]) == (72.49, 83.11)
    weights = torchvision.models.ResNet18_Weights.IMAGENET1K_V1
    assert top1["resnet18"] == weights.meta["_metrics"]["ImageNet-1K"]["acc@1"] == 69.758
    assert {name for name in top1 if report.is_vanillanet(name)} == set(benchmark.timm.list_models("vanillanet*"))


def test_figures_show_networks_as_published():
    """A variant's label would not be known as a VanillaNet's."""
    rows = results.read(Path(__file__).parents[1] / "results" / "cpu.csv")
    assert any(row["network"] == "vanillanet_11 (built deployed)" for row in rows)
    depths = [
        x for line in report.latency_depth(rows).axes[0].lines if "other" in line.get_label() for x in line.get_xdata()
    ]
    assert min(depths) > 13
    assert len(depths) == len(
        {
            (row["network"], row["precision"])
            for row in rows
            if not report.is_vanillanet(row["network"].partition(" (")[0])
        }
    )


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


def test_the_committed_page_is_made_from_the_committed_results(tmp_path):
    docs = Path(benchmark.__file__).with_name("docs")
    rows = [row for name in ("cpu", "training") for row in results.read(docs.parent / "results" / f"{name}.csv")]
    report.write_page(tmp_path / "benchmark.md", rows, figures=tmp_path)
    assert (tmp_path / "benchmark.md").read_text() == (docs / "benchmark.md").read_text()


def test_a_process_that_cannot_says_why(tmp_path):
    spec = Spec("vanillanet_5", "openvino", "int7", 32, width_mult=1 / 32)
    (reason,) = prepare([spec], tmp_path, threads=1).values()
    assert "int7" in reason
    with (
        closing([Worker(Spec("nosuchnet", "eager", "fp32", 32), tmp_path, threads=1)]) as (worker,),
        pytest.raises(WorkerError, match="nosuchnet is not known"),
    ):
        worker.ready()


# -- refusals


def test_code_in_a_checkpoint_is_not_run(hostile, tmp_path, capsys):
    path = hostile()
    with pytest.raises(SystemExit) as ended:
        run("--models", path, "--runtimes", "eager", "--precisions", "fp32", "--calls", 2)
    assert ended.value.code == 2
    assert "refused" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["hostile.pth"]


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
    ],
)
def test_bad_requests(capsys, arguments, named):
    with pytest.raises(SystemExit) as ended:
        run(*shlex.split(arguments))
    lines = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2
    assert len(lines) == 1
    assert named in lines[0]


def test_a_table_of_something_else(tmp_path, capsys):
    (tmp_path / "other.csv").write_text("epoch,loss\n1,2\n")
    with pytest.raises(SystemExit):
        run("--report", tmp_path / "other.csv")
    assert "no column kind" in capsys.readouterr().err
