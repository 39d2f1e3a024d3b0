"""The ablation: its runs, and that the committed page and tables are those of the committed files."""

import csv
import shlex
from dataclasses import replace
from statistics import mean, stdev

import pytest

import ablation
from ablation import EXPERIMENTS, Experiment, Trial
from options import parse_args

SWITCHES = {"neither": (0, 0), "deep training": (0, 4), "series activation": (3, 0), "both": (3, 4)}


def command(trial):
    return parse_args([*trial.flags, "--data_path", "x", "--output_dir", "y"])


def all_trials():
    return {trial for experiment in EXPERIMENTS.values() for trial in experiment.trials()}


def test_each_run_is_a_command_and_differs_in_one_thing():
    defaults = {recipe: vars(command(Trial(recipe))) for recipe in {trial.recipe for trial in all_trials()}}
    for trial in all_trials():
        args = vars(command(trial))
        own = (f"vanillanet_{trial.depth}", trial.act_num, trial.decay_epochs, trial.seed)
        assert (args["model"], args["act_num"], args["decay_epochs"], args["seed"]) == own
        changed = {name for name in args if args[name] != defaults[trial.recipe][name]}
        assert changed <= {"model", "act_num", "decay_epochs", "seed", "epochs"}
        assert args["epochs"] == (trial.epochs or defaults[trial.recipe]["epochs"])
    combinations = {name: (one.act_num, one.decay_epochs) for name, one in EXPERIMENTS["claims"].variants.items()}
    assert combinations == SWITCHES
    assert list(EXPERIMENTS) == ["claims", "act_num", "depth", "long"]  # the most valuable first
    assert {experiment.seeds for experiment in EXPERIMENTS.values()} == {3}
    longer = [(one.act_num, one.decay_epochs, one.epochs) for one in EXPERIMENTS["long"].variants.values()]
    assert longer == [(3, 0, 20), (3, 8, 20)]
    assert list(EXPERIMENTS["claims"].paper.values()) == [59.58, 60.53, 75.23, 76.36]
    assert list(EXPERIMENTS["act_num"].variants) == ["0", "1", "2", "3", "4"]
    assert list(EXPERIMENTS["depth"].variants) == ["5", "6", "9", "13"]


def test_a_run_shared_by_experiments_is_done_once():
    assert [name for name, one in EXPERIMENTS.items() if ablation.SHORT in one.trials()] == ["act_num", "depth"]
    assert len({trial.name for trial in all_trials()}) == len(all_trials()) == 3 * (4 + 5 + 3 + 2)


def record(trial, top1):
    trial.record.parent.mkdir(parents=True, exist_ok=True)
    trial.record.write_text(f"epoch,test_acc1\n0,99.0\n1,{top1}\n")


def test_the_table_holds_mean_and_deviation_of_what_was_run(tmp_path, monkeypatch):
    monkeypatch.setattr(ablation, "RECORDS", tmp_path / "results")
    on, off = Trial(), Trial(decay_epochs=0)
    experiment = Experiment("trained with", {"on": on, "off": off, "later": Trial(depth=9)}, seeds=3, paper={"on": 1.5})
    experiment.paper["off"] = 2.0
    for seed, top1 in enumerate((80.0, 81.0, 85.0)):
        record(replace(on, seed=seed), top1)
    record(replace(off, seed=1), 70.25)
    assert experiment.results() == {"on": [80.0, 81.0, 85.0], "off": [70.25]}
    assert ablation.markdown(experiment).splitlines() == [
        "| trained with | top-1 (%) | std | runs | paper: ImageNet top-1 (%) |",
        "| --- | ---: | ---: | ---: | ---: |",
        f"| on | {mean((80, 81, 85)):.2f} | {stdev((80, 81, 85)):.2f} | 3 | 1.50 |",
        "| off | 70.25 |  | 1 | 2.00 |",
        "",
        "Not run yet: later.",
    ]


def test_the_committed_page_is_made_from_the_committed_files():
    text = ablation.PAGE.read_text()
    assert ablation.write_page(text) == text
    assert "<!-- table: claims -->" in text
    with pytest.raises(ValueError, match=r"RESULTS.md has no place for the table depth"):
        ablation.write_page(text.replace("<!-- table: depth -->", ""))


def test_the_committed_files_are_of_finished_runs():
    for trial in all_trials():
        if trial.record.exists():
            with trial.record.open(newline="") as file:
                rows = list(csv.DictReader(file))
            args = command(trial)
            assert [int(row["epoch"]) for row in rows] == list(range(args.epochs)), trial.name
            ramp = [min(1.0, epoch / args.decay_epochs) if args.decay_epochs else 1.0 for epoch in range(args.epochs)]
            assert [float(row["act_learn"]) for row in rows] == pytest.approx(ramp), trial.name
    known = {trial.record.name for trial in all_trials()}
    assert {path.name for path in ablation.RECORDS.glob("*.csv")} <= known


def test_a_run_ends_in_the_records_and_is_not_repeated(tiny_fmnist, tmp_path, monkeypatch, capsys):
    """Through main.py, on 60 images."""
    monkeypatch.setattr(ablation, "RECORDS", tmp_path / "results")
    monkeypatch.setattr(ablation, "EXPERIMENTS", {"one": Experiment("n", {"0": Trial(act_num=0)}, seeds=1)})
    ablation.run_all(["one"], str(tiny_fmnist), tmp_path / "runs", 1)
    trial = Trial(act_num=0)
    assert capsys.readouterr().out.splitlines()[1] == f"{trial.name}: top-1 {trial.top1:.2f}"
    with trial.record.open(newline="") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == [str(epoch) for epoch in range(10)]
    ablation.run_all(["one"], "not there any more", tmp_path / "runs", 1)
    assert capsys.readouterr().out.startswith("0 of 1 runs to do")
    ablation.draw(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5000


def failure(capsys, *argv):
    with pytest.raises(SystemExit) as ended:
        ablation.main([*argv])
    return ended.value.code, capsys.readouterr().err.splitlines()[-1]


def test_a_failing_run_is_one_line(tiny_fmnist, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ablation, "RECORDS", tmp_path / "results")
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
    assert (code, line) == (
        1,
        f"ablation.py: error: there are no runs in {tmp_path / 'results'}: start some without --report",
    )
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
    assert failure(capsys) == (2, "ablation.py: error: --data_path is missing; --report does without")
