"""`data/prepare.py` and `launch/plan.py`: a plan, and commands that work as they are printed."""

import shlex

import numpy as np
import pytest
import yaml
from PIL import Image

from configs.recipes import load_recipe
from data import prepare
from launch import plan
from launch.plans.text import duration
from tests.conftest import ROOT, names, run
from tests.data.helpers import as_folder, picture


def scans(folder, labels=("ill", "it's well"), count=40, bits=12):
    """Grey PNGs of 16 bits, of values up to 2 ** bits."""
    random = np.random.default_rng(0)
    for i in range(count):
        label = labels[i % len(labels)]
        (folder / label).mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 1 << bits, (24, 28)).astype(np.uint16) >> (i % len(labels))
        Image.fromarray(pixels).save(folder / label / f"{i:02}.png")


def pasted(done, begins):
    """Words of the last command that a command has printed, after `begins`."""
    return shlex.split([line for line in done.stdout.splitlines() if line.startswith(begins)][-1][len(begins) :])


@pytest.mark.slow
def test_the_printed_commands_of_grey_16_bit_images(tmp_path):
    """From a folder outside of the project, with blanks and quotes in the names."""
    scans(tmp_path / "my scans")
    quick = ["--run.log_every", "1", "--data.workers", "0"]
    done = run(
        "python",
        ROOT / "data/prepare.py",
        "my scans",
        "shards/it's",
        "--val-fraction",
        "0.2",
        "--dry-run",
        cwd=tmp_path,
    )
    done = run(*pasted(done, "next: "), cwd=tmp_path)
    assert "grey, more than 8 bits" in done.stdout and (tmp_path / "shards/it's/plan.yaml").exists()
    words, later = pasted(done, "ready: "), pasted(done, "then: ")
    done = run(*words, *quick, "--run.max_steps", "1", cwd=tmp_path)
    assert pasted(done, "next: ") == later
    done = run(*later, *quick, "--run.max_steps", "1", cwd=tmp_path)
    done = run(*pasted(done, "next: "), "--workers", "0", cwd=tmp_path)
    assert (tmp_path / "runs/it's-finetuned/evaluation-it's-val-best/evaluation.json").exists()
    # from scratch, mean and std are the plan's
    scratch = ["--init", "none", "--run.max_steps", "1", "--run.name", "scratch"]
    run("python", *later[1 : later.index("--init")], *quick, *scratch, cwd=tmp_path)
    resolved = yaml.safe_load((tmp_path / "runs/scratch/config.yaml").read_text())
    recipe = load_recipe(tmp_path / "shards/it's/plan.yaml", "pretrain")
    assert resolved["data"]["mean"] == recipe["data.mean"] and recipe["data.mean"][0] < 0.05


@pytest.mark.slow
def test_the_printed_commands_of_colour_images(tmp_path):
    """Without a GPU, crops are compared; the file is FCMAE's all the same."""
    source = as_folder(
        {f"{label}/{i}.png": picture(i, (28, 24), kind="png") for label in "ab" for i in range(150)}, tmp_path / "in"
    )
    done = run("python", ROOT / "data/prepare.py", source, "shards", "--val-fraction", "0.1", cwd=tmp_path)
    words, later = pasted(done, "ready: "), pasted(done, "then: ")
    plan = tmp_path / "shards/plan.yaml"
    assert load_recipe(plan, "pretrain")["objective.name"] == "lejepa" and "crops/s" in plan.read_text()
    quick = ["--run.log_every", "1", "--data.workers", "0", "--run.max_steps", "1"]
    done = run(*words, *quick, cwd=tmp_path)
    assert pasted(done, "next: ") == later and "runs/shards/fcmae.pt" in later
    run(*later, *quick, cwd=tmp_path)


def test_a_folder_without_labels(tmp_path):
    scans(tmp_path / "in", labels=("",), count=5)
    done = run("python", ROOT / "launch/plan.py", "in", "--out", "p.yaml", cwd=tmp_path)
    assert "fine-tuning needs labels" in done.stdout and "then:" not in done.stdout
    assert "# fine-tuning needs labels" in (tmp_path / "p.yaml").read_text()
    done = run(*pasted(done, "ready: "), "--run.max_steps", "1", "--data.workers", "0", cwd=tmp_path)
    done = run(*pasted(done, "next: "), "--workers", "0", cwd=tmp_path)
    assert (tmp_path / "in.parquet").exists()
    error = run("python", ROOT / "launch/plan.py", "in", "--out", "p.yaml", cwd=tmp_path, code=2).stderr
    assert error.startswith("error: p.yaml exists") and error.count("\n") == 1


@pytest.fixture
def planned(tmp_path, monkeypatch):
    """Calls `data/prepare.py` on images with a planner that exits with a code, and returns its calls."""
    scans(tmp_path / "in", count=4)
    calls = []

    def call(code, *words):
        def planner(argv, check):
            calls.append(argv)
            if code == 0:
                (tmp_path / "out/plan.yaml").touch()
            return prepare.subprocess.CompletedProcess(argv, code)

        monkeypatch.setattr(prepare.subprocess, "run", planner)
        argv = ["prepare.py", str(tmp_path / "in"), str(tmp_path / "out"), "--workers", "1", *words]
        monkeypatch.setattr("sys.argv", argv)
        prepare.prepare_and_plan()
        return calls

    return call


def test_the_shards_stand_if_the_plan_fails(planned, tmp_path, capsys):
    planned(2)
    output = capsys.readouterr().out
    assert "the shards are complete; only the plan is missing" in output and "launch/plan.py" in output
    assert (tmp_path / "out/index.json").exists()
    assert len(planned(0)) == 2  # the same command plans again


def test_a_plan_is_kept(planned, tmp_path, capsys):
    planned(0)
    (tmp_path / "out/plan.yaml").write_text("# edited")
    assert len(planned(0)) == 1
    assert "is kept" in (output := capsys.readouterr().out) and "ready: " in output
    assert (tmp_path / "out/plan.yaml").read_text() == "# edited"


def test_no_plan(planned, tmp_path, capsys):
    assert planned(0, "--no-plan") == []
    assert "next: " in capsys.readouterr().out and "plan.yaml" not in names(tmp_path / "out")


def test_durations():
    assert [duration(s) for s in (0.2, 59, 150, 5000, 90_000, 10 * 86_400)] == [
        "1 seconds", "59 seconds", "2.5 minutes", "83 minutes", "25 hours", "10 days",
    ]  # fmt: skip


def test_names_of_runs(tmp_path):
    (tmp_path / "cats.tar").touch()
    (tmp_path / "v1.5").mkdir()
    names = [plan.run_name(str(tmp_path / name)) for name in ("cats.tar", "v1.5", "v1.5/")]
    assert names == ["cats", "v1.5", "v1.5"] and plan.run_name("s3://bucket/shards/photos") == "photos"
