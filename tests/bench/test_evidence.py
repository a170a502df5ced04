"""The experiments of docs/results.md: which commands run in which order, and the page made from them."""

import json
import math
import shlex
import subprocess
from pathlib import Path

import pytest

from bench import evidence_page, runner, tables
from bench.dense_evidence import DOMAINS, Dense
from bench.evidence import ABLATIONS, PARTS, SCALES, SEEDS, Evidence, main, run_name
from configs.command import parse, parse_options
from configs.schema import Finetune, Pretrain
from finetune.evaluate import Options
from finetune.tasks import TASKS
from pretrain.objectives import OBJECTIVES
from tests.conftest import ROOT

RATES = SCALES["cpu"].rates
BEST = {"scratch": RATES[0] / 2, "fcmae": RATES[1]}  # the learning rates of the stand-in; one is outside


def accuracy(start: str, share: float, rate: float, seed: int) -> float:
    """Accuracy of a fake fine-tuning: FCMAE is better and has another best learning rate."""
    off = abs(math.log2(rate / BEST.get(start, RATES[1])))
    return 0.3 + 0.2 * share + (0.1 if start == "fcmae" else 0) - 0.01 * off + seed / 1e3


def stand_in(runs: list[str]):
    """A fake `subprocess.run` that records the run's name and writes the files of the command."""

    def run(words: list[str], check: bool) -> subprocess.CompletedProcess:
        _, command, *rest = words
        if command == "data/prepare.py":
            runs.append(Path(rest[1]).name)
            return subprocess.CompletedProcess(words, 0)
        if command == "finetune/evaluate.py":
            args = parse_options(Options, "", rest)
            folder, name = Path(args.out), f"{Path(args.weights).parent.name}-test"
            written = {"split": args.split, "scores": {"top1": 0.5}, "predictions": "many"}
            assert (args.split, Path(args.weights).name) == ("test", "best.pt")
        else:
            kind, choices = Finetune, {"task": TASKS}
            if command == "pretrain/main.py":
                kind, choices = Pretrain, {"objective": OBJECTIVES}
            config = parse(kind, "", "", choices, rest)
            folder, name = Path(config.run.folder) / config.run.name, config.run.name
            written = {"seconds": 60, "hardware": "two cores"} | summary(config)
        runs.append(name)
        folder.mkdir(parents=True)
        file = "evaluation.json" if command == "finetune/evaluate.py" else "summary.json"
        (folder / file).write_text(json.dumps(written))
        return subprocess.CompletedProcess(words, 0)

    return run


def summary(config: Pretrain | Finetune) -> dict:
    """The part of summary.json that the page reads."""
    if isinstance(config, Finetune):
        start = "scratch" if config.init == "none" else Path(config.init).parent.name
        share = config.task.label_share
        top1 = accuracy(start, share, config.optim.lr, config.run.seed)
        read = {"task": {"label_share": share}, "optim": {"lr": config.optim.lr}, "run": {"seed": config.run.seed}}
        return {"stage": "fine-tuning", "best": dict.fromkeys(("top1", "miou", "ap50"), top1), "config": read}
    epochs = range(0, config.optim.epochs + 1, max(1, config.probe.every))
    probed = epochs if config.probe.every else ()
    return {
        "stage": "pretraining", "epochs": config.optim.epochs, "steps": 100,
        "loss": {str(i): 1 / i for i in range(1, config.optim.epochs + 1)}, "images_per_s": {"1": 100.0},
        "knn": {str(i): {"top1_k20": 0.3 + i / 1000} for i in probed},
        "linear": {str(i): {"top1": 0.35 + i / 1000} for i in probed},
        "unlabelled": {str(i): {"loss": 1 / (1 + i), "rankme": 5 + i, "alpha": 1.0} for i in probed},
        "feature_distance": {str(i): {f"stage_{j}": 0.1 * j for j in (1, 2, 3, 4)} for i in epochs if i},
        "config": {"objective": {"mask_ratio": config.objective.mask_ratio}},
    }  # fmt: skip


@pytest.fixture
def started(tmp_path, monkeypatch):
    """A folder with the fake commands; the names of the runs started in it."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runner, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "results")
    runs: list[str] = []
    monkeypatch.setattr(runner.subprocess, "run", stand_in(runs))
    return runs


def test_labels(started):
    """Each start selects its learning rate, then runs all seeds; every test evaluation comes last, once."""
    Evidence("cpu", dry=False, save=False).labels()
    shares = sorted(SCALES["cpu"].budgets)
    assert started[0] == "fcmae" and len(started) == len(set(started))
    tested = [name for name in started if name.endswith("-test")]
    assert started[-len(tested) :] == tested
    wanted = [
        run_name(start, share, rate, seed) + "-test"
        for share in shares
        for start, rate in BEST.items()
        for seed in SEEDS
    ]
    assert tested == wanted
    tuned = len(started) - 1 - len(tested)
    tried = {"scratch": [RATES[0] / 4, RATES[0] / 2, *RATES], "fcmae": RATES}
    assert tuned == len(shares) * sum(len(rates) + len(SEEDS) - 1 for rates in tried.values())
    assert {run_name(start, 0.1, rate, 0) for start in tried for rate in tried[start]} <= set(started)


def test_it_resumes(started):
    Evidence("cpu", dry=False, save=False).labels()
    done = list(started)
    Path("runs/evidence-cifar10-cpu/done/fcmae-labels-0.1-lr-0.016-seed-0.json").unlink()
    runner.shutil.rmtree("runs/evidence-cifar10-cpu/fcmae-labels-0.1-lr-0.016-seed-0")
    Evidence("cpu", dry=False, save=False).labels()
    assert started[len(done) :] == ["fcmae-labels-0.1-lr-0.016-seed-0"]


def test_it_stops_at_a_failed_command(started, monkeypatch):
    failed = subprocess.CompletedProcess([], 2)
    monkeypatch.setattr(runner.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(SystemExit) as end:
        Evidence("cpu", dry=False, save=False).labels()
    assert end.value.code == 2 and not Path("runs/evidence-cifar10-cpu/done").exists()


@pytest.mark.parametrize("name", DOMAINS)
def test_dense(name, started, tmp_path):
    """A learning rate for each start and share; other images take that of the images; all seeds."""
    Dense(name, tmp_path, tmp_path / "others", dry=False, save=True).run()
    shares, rates = list(DOMAINS[name].budgets), DOMAINS[name].rates
    pretrained = ["fcmae", *DOMAINS[name].rivals]
    assert started[: 1 + len(pretrained)] == [name, *pretrained] and len(started) == len(set(started)), "prepared once"
    tuned = [run for run in started if "-labels-" in run]
    for start in ("scratch", *pretrained, "fcmae-others"):
        for share in shares:
            mine = [run for run in tuned if run.startswith(f"{start}-labels-{share:g}-")]
            tried = {run.split("-lr-")[1].split("-seed-")[0] for run in mine}
            assert len(mine) == len(SEEDS) + (len(tried) - 1), (start, share)
            assert (len(tried) == 1) == (start == "fcmae-others") and (len(tried) >= len(rates) or len(tried) == 1)
    assert {path.stem for path in (tmp_path / f"results/{name}").iterdir()} == {*pretrained, "fcmae-others", *tuned}


@pytest.mark.parametrize("scale", SCALES)
def test_dry_run(scale, started, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["evidence.py", scale, str(tmp_path), "--dry-run"])
    main()
    commands = [shlex.split(line[len("\033[1m$ ") : -len("\033[0m")]) for line in capsys.readouterr().out.splitlines()]
    assert not started and not (tmp_path / "runs").exists()
    assert commands[0][1:3] == ["data/prepare.py", str(tmp_path)]
    more = 2 * len(SCALES[scale].objectives) + len(SEEDS) * len(SCALES[scale].masks)
    assert sum(words[1] == "pretrain/main.py" for words in commands) == 1 + more + 3 + len(ABLATIONS)
    for words in commands:
        assert (ROOT / words[1]).exists()


def test_some_of_the_ablations(started, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["evidence.py", "cpu", str(tmp_path), "zeroed", "mask-0.9", "--dry-run"])
    main()
    printed = [line for line in capsys.readouterr().out.splitlines() if "prepare.py" not in line]
    names = [line.split("--run.name ")[1].split()[0] for line in printed]
    tuned = "-labels-0.1-lr-0.016-seed-0"
    assert names == ["zeroed", f"zeroed{tuned}", "mask-0.9", f"mask-0.9{tuned}"]


def test_bad_input(refused, tmp_path):
    assert "nowhere" in refused(main, "cpu", tmp_path / "nowhere")
    assert "mask-0.4" in refused(main, "cpu", tmp_path, "grn")


def test_page(started, tmp_path):
    """The page has the numbers of the runs, and names what is not measured."""
    evidence_runs = Evidence("cpu", dry=False, save=True)
    evidence_runs.labels()
    text, pictures = evidence_page.page()
    assert pictures.keys() == {"results-cpu-labels.svg", "results-cpu-probes.svg"}
    assert "| 10% | 4,500 | 50.00% (50.00% to 50.00%) | 50.00% (50.00% to 50.00%) | +0.0 | 0.0 | 3 |" in text
    assert "| fcmae | 5 | -1.00 | +1.00 | - | 50 | - |" in text  # loss, RankMe and alpha with kNN
    assert "### Backends\n\nNot measured yet" in text and "## On a GPU\n\n**Not measured yet.**" in text
    for name in started:
        if not name.endswith("-test"):
            assert f"| {name} |" in text
    for part in PARTS.values():
        part(evidence_runs)
    for name in DOMAINS:
        assert f": {name}\n\n**Not measured yet.**" in text
        Dense(name, tmp_path, tmp_path / "others", dry=False, save=True).run()
    text, pictures = evidence_page.page()
    assert (
        "unfinished" not in text and text.count("| gain, points |") == 1 and text.count("gain of FCMAE") == len(DOMAINS)
    )
    assert len(pictures) == 4 and text.count("Not measured yet") == 1  # the GPU's
    assert "| dense convolutions, hidden patches set to zero | 75.0% |" in text
    assert "| without (V1) | 10 | 0.100 | 0.200 | 0.300 | 0.400 |" in text
    assert "| masked | 0.250000 | 0.0e+00 | 100 images |" in text
    assert "| 31.00% (31.00% to 31.00%) | 36.00% (36.00% to 36.00%) | 32.10% (32.00% to 32.20%), lr 0.016 | 3 |" in text
    cells = [f"{top1:.2%} ({top1:.2%} to {top1:.2%})" for top1 in (0.34, 0.39, 0.5, 0.5)]  # last evaluated in epoch 40
    assert f"| FCMAE, Muon | 45 | 1, two cores | {' | '.join(cells)} | 2 |" in text


def test_measures_without_labels_appear_only_if_results_have_them():
    knn = {str(epoch): {evidence_page.K: value} for epoch, value in enumerate((0.9, 0.1, 0.3, 0.2, 0.4))}
    runs = {"a": {"knn": knn, "unlabelled": {epoch: {"loss": 1.0, "rankme": float(epoch)} for epoch in knn}}}
    text, _ = evidence_page.unlabelled(runs, "cpu")
    assert "| a | 4 | - | +0.80 | - | 4 | - |" in text  # without the random weights of epoch 0
    assert evidence_page.unlabelled({"a": {"knn": knn}}, "cpu") is None


def test_the_page_is_that_of_the_results():
    """docs/results.md and its pictures are what bench/evidence_page.py makes of bench/results/."""
    text, pictures = evidence_page.page()
    assert evidence_page.PAGE.read_text() == text
    for name in pictures:
        assert evidence_page.PAGE.with_name(name).exists()
    assert all(name in text for name in pictures)
