"""The ablation: its runs, and that the committed page and tables are those of the committed files."""

import csv
import shlex
import statistics
from dataclasses import replace
from statistics import mean, stdev

import pytest
from PIL import Image
from scipy.stats import ttest_ind

import ablation
from ablation import EXPERIMENTS, Experiment, Trial
from benchmarking import results
from options import parse_args

SWITCHES = {"neither": (0, 0), "deep training": (0, 4), "series activation": (3, 0), "both": (3, 4)}


def command(trial):
    return parse_args([*trial.flags, "--data_path", "x", "--output_dir", "y"])


def all_trials():
    return {trial for experiment in EXPERIMENTS.values() for trial in experiment.trials()}


def test_each_run_is_a_command_and_differs_in_one_thing():
    recipes = {trial.recipe for trial in all_trials()}
    defaults = {recipe: vars(command(Trial(recipe, model="vanillanet_6"))) for recipe in recipes}
    for trial in all_trials():
        args = vars(command(trial))
        if trial.model:
            assert args == {**defaults[trial.recipe], "model": trial.model, "seed": trial.seed}
            continue
        own = (f"vanillanet_{trial.depth}", trial.act_num, trial.decay_epochs, trial.seed)
        assert (args["model"], args["act_num"], args["decay_epochs"], args["seed"]) == own
        changed = {name for name in args if args[name] != defaults[trial.recipe][name]}
        assert changed <= {"model", "act_num", "decay_epochs", "seed", "epochs"}
        assert args["epochs"] == (trial.epochs or defaults[trial.recipe]["epochs"])
    combinations = {name: (one.act_num, one.decay_epochs) for name, one in EXPERIMENTS["claims"].variants.items()}
    assert combinations == SWITCHES
    photographs = EXPERIMENTS["photographs"].variants
    assert {name: (one.act_num, one.decay_epochs) for name, one in photographs.items()} == SWITCHES
    assert {one.recipe for one in photographs.values()} == {"cifar10"}
    # the most valuable first
    assert list(EXPERIMENTS) == ["claims", "photographs", "act_num", "depth", "peers", "long"]
    assert ablation.SEEDS == 3
    longer = [(one.act_num, one.decay_epochs, one.epochs) for one in EXPERIMENTS["long"].variants.values()]
    assert longer == [(3, 0, 20), (3, 8, 20)]
    assert list(EXPERIMENTS["claims"].paper.values()) == [59.58, 60.53, 75.23, 76.36]
    assert list(EXPERIMENTS["act_num"].variants) == ["0", "1", "2", "3", "4"]
    assert list(EXPERIMENTS["depth"].variants) == ["5", "6", "9", "13"]


def test_a_run_shared_by_experiments_is_done_once():
    assert [name for name, one in EXPERIMENTS.items() if ablation.SHORT in one.trials()] == ["act_num", "depth"]
    assert len({trial.name for trial in all_trials()}) == len(all_trials()) == 3 * (4 + 4 + 5 + 3 + 4 + 2)


def record(folder, trial, *top1):
    """The files of finished runs, with these accuracies, of the seeds from 0 on."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, value in enumerate(top1):
        replace(trial, seed=seed).record(folder).write_text(f"epoch,test_acc1\n0,99.0\n1,{value}\n")


def test_the_table_holds_mean_and_deviation_of_what_was_run(tmp_path, monkeypatch):
    monkeypatch.setattr(ablation, "RECORDS", tmp_path)
    on, off = Trial(), Trial(decay_epochs=0)
    experiment = Experiment("title", "trained with", {"on": on, "off": off, "later": Trial(depth=9)})
    record(tmp_path, on, 80.0, 81.0, 85.0)
    record(tmp_path, off, 70.25)
    assert experiment.scores(tmp_path) == {"on": [80.0, 81.0, 85.0], "off": [70.25], "later": []}
    experiment.paper.update(on=1.5, off=2.0, later=3.0)
    assert ablation.scores_table(experiment).splitlines() == [
        "| trained with | top-1 (%) | std | paper: ImageNet top-1 (%) |",
        "| --- | ---: | ---: | ---: |",
        f"| on | {mean((80, 81, 85)):.2f} | {stdev((80, 81, 85)):.2f} | 1.50 |",
        "| off | not measured yet (1 of 3 seeds) |  | 2.00 |",
        "| later | not measured yet |  | 3.00 |",
    ]


def test_the_interval_is_students():
    """As scipy has it, which comes with grad-cam."""
    one, other = (80.1, 81.0, 85.2), (79.0, 78.5, 79.9)
    interval = ttest_ind(one, other).confidence_interval(0.95)
    points, margin = ablation.difference(one, other)
    assert (points - margin, points + margin) == pytest.approx((interval.low, interval.high), rel=1e-3)
    assert ablation.difference(one, other[:2]) is None


def test_what_the_page_says_follows_from_the_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(ablation, "RECORDS", tmp_path)
    claims = EXPERIMENTS["claims"].variants
    record(tmp_path, claims["neither"], 78.0, 78.1, 78.2)
    record(tmp_path, claims["deep training"], 77.0, 77.1, 77.2)
    record(tmp_path, claims["series activation"], 85.0, 86.0, 85.5)
    record(tmp_path, claims["both"], 85.2, 86.1, 85.7)
    said, table = ablation.comparisons().split("\n\n")
    gains, none, losses, missing = said.replace("\n", " ").split(". ")
    assert gains.endswith("series activation, without deep training; series activation, with deep training")
    assert none.endswith("seeds do as much: deep training, with series activation, 10 epochs")
    assert losses == "These are losses here: deep training, without series activation"
    assert missing.startswith("Not measured yet: series activation, without deep training, on CIFAR-10;")
    assert "| deep training, without series activation | -1.00 ± 0.23 | loss | +0.95 |" in table
    assert "| n of 1 instead of 0 |  | not measured yet |  |" in table
    said, _, *table = ablation.decay_table().splitlines()
    assert said == "The fault changed these accuracies by more than the seeds do: deep training."
    assert table[2].startswith("| neither | 78.16 | 0.14 | 78.10 | 0.10 | -0.06 ± ")


def test_the_networks_of_equal_latency_are_so():
    """What the page says: VanillaNet-6 is within a tenth of two peers, and the third takes longer."""
    measured = results.read(ablation.LATENCIES)
    assert {(row["resolution"], row["batch"], row["precision"]) for row in measured} == {(32, 1, "fp32")}
    assert {row["network"] for row in measured} == set(ablation.PEERS.values())
    best = {
        name: min(row["median_ms"] for row in measured if row["network"] == name) for name in ablation.PEERS.values()
    }
    ours = best.pop("vanillanet_6")
    assert 0.9 < ours / best["resnet18"] < 1.1
    assert 0.9 < ours / best["efficientnet_lite0"] < 1.1
    assert ours < best["convnext_atto"]


def test_at_equal_latency_only_resnet18_is_ahead():
    """What the page says, while its figures say so."""
    scores, page = EXPERIMENTS["peers"].scores(ablation.RECORDS), ablation.PAGE.read_text()
    for peer, said in (("ResNet-18", "loss"), ("ConvNeXt-Atto", "gain"), ("EfficientNet-Lite0", "gain")):
        found = ablation.difference(scores["VanillaNet-6"], scores[peer])
        assert ablation.verdict(found) == said
        assert f"by {abs(found[0]):.2f} ± {found[1]:.2f}" in " ".join(page.split())
    took = {
        row["network"]: row["median_ms"]
        for row in sorted(results.read(ablation.LATENCIES), key=lambda row: -row["median_ms"])
    }
    assert 1.3 < took["convnext_atto"] / took["vanillanet_6"] < 1.37
    # The loss over the training images, after the last epoch.
    with Trial(recipe="equal_latency", model="efficientnet_lite0").record(ablation.RECORDS).open(newline="") as file:
        assert float(list(csv.DictReader(file))[-1]["train_acc1"]) < 65


def test_twenty_epochs_show_no_gain_of_deep_training_either():
    """What the page says, while its figures say so."""
    ten, twenty = (EXPERIMENTS[name].scores(ablation.RECORDS) for name in ("claims", "long"))
    for name in ("series activation", "both"):
        assert 1.9 < mean(twenty[name]) - mean(ten[name]) < 2.2
    found = ablation.difference(twenty["both"], twenty["series activation"])
    assert ablation.verdict(found) == "no more than the seeds"
    assert f"the seeds do: {found[0]:+.2f} ± {found[1]:.2f} points" in ablation.PAGE.read_text()


def test_the_series_activation_adds_most():
    """What the figure's title says, while its figures say so."""
    found = {}
    for statement, name, on, off in ablation.COMPARISONS:
        scores = EXPERIMENTS[name].scores(ablation.RECORDS)
        found[statement] = ablation.difference(scores[on], scores[off])[0]
    gains = [points for statement, points in found.items() if statement.startswith("series activation")]
    others = [points for statement, points in found.items() if statement.startswith("deep") or "layers" in statement]
    assert (len(gains), len(others)) == (4, 8)
    assert min(gains) > 5 > 1.5 > max(others)


def test_no_larger_n_adds_to_the_gain_of_one():
    """What the page says, while its figures say so."""
    scores = list(EXPERIMENTS["act_num"].scores(ablation.RECORDS).values())
    assert ablation.verdict(ablation.difference(scores[1], scores[0])) == "gain"
    assert {ablation.verdict(ablation.difference(larger, scores[1])) for larger in scores[2:]}.isdisjoint({"gain"})


def test_depth_brings_nothing_here():
    """What the page says, while its figures say so."""
    five, six, nine, thirteen = EXPERIMENTS["depth"].scores(ablation.RECORDS).values()
    assert statistics.mean(five) > max(map(statistics.mean, (six, nine, thirteen)))
    lost, margin = ablation.difference(six, five)
    assert f"six lose {-lost:.2f} ± {margin:.2f} points" in ablation.PAGE.read_text()
    for deeper, shallower in ((nine, six), (thirteen, nine)):
        assert ablation.verdict(ablation.difference(deeper, shallower)) == "no more than the seeds"


def test_the_committed_page_is_made_from_the_committed_files():
    text = ablation.PAGE.read_text()
    assert ablation.write_page(text) == text
    with pytest.raises(ValueError, match=r"RESULTS.md has no place for the part depth"):
        ablation.write_page(text.replace("<!-- depth -->", ""))


def test_the_committed_files_are_of_finished_runs():
    for trial in all_trials():
        path = trial.record(ablation.RECORDS)
        if path.exists():
            with path.open(newline="") as file:
                rows = list(csv.DictReader(file))
            args = command(trial)
            assert [int(row["epoch"]) for row in rows] == list(range(args.epochs)), trial.name
            if args.model.startswith("vanillanet"):
                length = args.decay_epochs
                ramp = [min(1.0, epoch / length) if length else 1.0 for epoch in range(args.epochs)]
                assert [float(row["act_learn"]) for row in rows] == pytest.approx(ramp), trial.name
    known = {trial.record(ablation.RECORDS) for trial in all_trials()}
    assert set(ablation.RECORDS.glob("*.csv")) <= known


def test_a_run_ends_in_the_records_and_is_not_repeated(tiny_fmnist, tmp_path, monkeypatch, capsys):
    """Through main.py, on 60 images."""
    folder = tmp_path / "results"
    monkeypatch.setattr(ablation, "RECORDS", folder)
    monkeypatch.setattr(ablation, "SEEDS", 1)
    trial = Trial(act_num=0, decay_epochs=0, epochs=3)
    monkeypatch.setattr(ablation, "EXPERIMENTS", {"claims": Experiment("title", "n", {"0": trial})})
    ablation.run_all(["claims"], tiny_fmnist, tmp_path, tmp_path / "runs", 1)
    assert capsys.readouterr().out.splitlines()[1] == f"{trial.name}: top-1 {trial.top1(folder):.2f}"
    with trial.record(folder).open(newline="") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["0", "1", "2"]
    ablation.run_all(["claims"], tmp_path / "not there any more", tmp_path, tmp_path / "runs", 1)
    assert capsys.readouterr().out.startswith("0 of 1 runs to do")


def test_photographs_come_from_torchvision_or_from_folders(tmp_path, monkeypatch, capsys):
    assert command(ablation.PHOTOGRAPHS).data_set == "torch/cifar10"
    for split in ("train", "test"):
        for name in ("frog", "ship"):
            (tmp_path / "cifar" / split / name).mkdir(parents=True)
            Image.new("RGB", (32, 32), (name == "frog" and "green") or "grey").save(
                tmp_path / "cifar" / split / name / "0.jpg"
            )
    monkeypatch.setattr(ablation, "RECORDS", tmp_path / "results")
    monkeypatch.setattr(ablation, "SEEDS", 1)
    short = replace(ablation.PHOTOGRAPHS, epochs=2, decay_epochs=0)
    monkeypatch.setattr(ablation, "EXPERIMENTS", {"photographs": Experiment("title", "n", {"0": short})})
    ablation.run_all(["photographs"], None, tmp_path / "cifar", tmp_path / "runs", 1)
    assert f"{short.name}: top-1 {short.top1(tmp_path / 'results'):.2f}" in capsys.readouterr().out
    assert ablation.cifar10_flags(tmp_path) == ["--data_path", str(tmp_path)]


def test_a_report_writes_the_page_and_the_figure(tmp_path, monkeypatch):
    page, figure = tmp_path / "RESULTS.md", tmp_path / "ablation.png"
    page.write_bytes(ablation.PAGE.read_bytes())
    for name, value in {"PAGE": page, "FIGURE": figure, "RECORDS": ablation.DECAYED}.items():
        monkeypatch.setattr(ablation, name, value)
    ablation.main(["--report"])
    assert "| both | 85.98 | 0.47 | 76.36 |" in page.read_text()
    assert "](ablation.png)" in page.read_text()
    with Image.open(figure) as image:
        assert image.getpixel((0, 0))[3] == 0  # transparent, for white pages and dark ones
        assert image.getcolors(1 << 24)[1:]


def failure(capsys, *argv):
    with pytest.raises(SystemExit) as ended:
        ablation.main([*argv])
    return ended.value.code, capsys.readouterr().err.splitlines()[-1]


def test_a_failing_run_is_one_line(tiny_fmnist, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ablation, "RECORDS", tmp_path / "results")
    monkeypatch.setattr(ablation, "SEEDS", 1)
    one = Experiment("title", "n", {"0": Trial(act_num=0, decay_epochs=0)})
    monkeypatch.setattr(ablation, "EXPERIMENTS", {"claims": one})
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    code, line = failure(capsys, *shlex.split(f"--data_path {tiny_fmnist} --only claims --jobs 1 --output_dir file"))
    assert code == 1
    assert line.startswith("ablation.py: error: ablation-depth6-n0-ramp0-seed0: main.py: error: ")
    assert str(tmp_path / "file") in line


def test_a_report_of_no_run_is_one_line_and_leaves_the_page(tmp_path, monkeypatch, capsys):
    page = tmp_path / "RESULTS.md"
    page.write_bytes(ablation.PAGE.read_bytes())
    monkeypatch.setattr(ablation, "PAGE", page)
    monkeypatch.setattr(ablation, "RECORDS", tmp_path / "results")
    code, line = failure(capsys, "--report")
    nothing = f"no two rows to compare have their 3 seeds in {tmp_path / 'results'}: run without --report"
    assert (code, line) == (1, f"ablation.py: error: {nothing}")
    monkeypatch.undo()
    assert page.read_bytes() == ablation.PAGE.read_bytes()


def test_missing_or_damaged_data_end_it_before_any_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ablation, "RECORDS", tmp_path / "results")
    for name in ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"):
        (tmp_path / name).write_bytes(b"no idx file")
    code, line = failure(capsys, "--data_path", str(tmp_path), "--only", "depth")
    assert code == 1
    assert line.startswith("ablation.py: error: ")
    assert "is not an idx file" in line
    missing = "ablation.py: error: --data_path is missing; --report and --only photographs do without"
    assert failure(capsys) == (2, missing)
    ignored = "ablation.py: error: --report runs nothing: leave --only out"
    assert failure(capsys, "--report", "--only", "depth") == (2, ignored)
