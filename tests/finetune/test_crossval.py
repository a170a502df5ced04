"""Cross-validation as a command: folds, summary, resuming, bad input."""

import json
import shutil
from pathlib import Path
from statistics import mean, stdev

import pytest

from finetune.crossval import main
from tests.conftest import has, run
from tests.finetune.tasks.helpers import words


def test_scores_of_complete_folds(digits, tmp_path, monkeypatch, capsys):
    """Folds are trained in turn, an interrupted one again, and summarised."""
    trained = []

    def train(launcher, words):
        folder = Path(words[-3]) / words[-1]
        trained.append((launcher, folder.name, words[words.index("--data.fold") + 1]))
        if len(trained) == 2:
            raise SystemExit(75)
        folder.mkdir(parents=True)
        best = {"epoch": 1, "weights": "raw", "top1": 0.1 * len(trained), "images": 10}
        (folder / "summary.json").write_text(json.dumps({"best": best, "init": "none", "shown": "top-1"}))

    monkeypatch.setattr("finetune.crossval.train", train)
    words = ["--data.path", digits, "--run.folder", tmp_path, "--run.name", "cv", "--folds", "3"]
    monkeypatch.setattr("sys.argv", ["crossval.py", *map(str, words), "--launcher", "deepspeed"])
    with pytest.raises(SystemExit):
        main()
    main()
    assert trained == [("deepspeed", f"fold-{i}", str(i)) for i in (0, 1, 1, 2)]
    assert "fold 0 is complete" in capsys.readouterr().out
    found = json.loads((tmp_path / "cv/summary.json").read_text())["scores"]["top1"]
    values = [0.1 * i for i in (1, 3, 4)]
    assert found == {"mean": pytest.approx(mean(values)), "std": pytest.approx(stdev(values)), "values": values}


@pytest.mark.slow
def test_folds_are_trained_once_and_summarised(tagged, tmp_path):
    command = ["finetune/crossval.py", "--folds", "2", *words(tagged, tmp_path, "cv", "labels", epochs=1)]
    run("python", *command)
    found = json.loads((tmp_path / "cv/summary.json").read_text())
    best = [json.loads((tmp_path / f"cv/fold-{i}/summary.json").read_text())["best"] for i in range(2)]
    values = [row["map"] for row in best]
    assert found["scores"]["map"] == {"mean": mean(values), "std": stdev(values), "values": values}
    assert [row["images"] for row in best] in ([143, 144], [144, 143])  # of 287 with labels

    (tmp_path / "cv/fold-1/complete.json").unlink()  # as after an interruption
    before = (tmp_path / "cv/fold-0/log.jsonl").stat().st_mtime_ns
    done = run("python", *command)
    assert "fold 0 is complete" in done.stdout and "fold 1 of 2" in done.stdout
    assert (tmp_path / "cv/fold-0/log.jsonl").stat().st_mtime_ns == before
    assert json.loads((tmp_path / "cv/summary.json").read_text())["scores"] == found["scores"]

    shutil.rmtree(tmp_path / "cv/fold-1")
    failed = run("python", *command, "--optim.lr", "1", code=2)  # another configuration of fold 0
    assert has(failed.stderr, "optim.lr") and not (tmp_path / "cv/fold-1").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--folds", "1"], "--folds 1 at least 2"),
        (["--data.fold", "1"], "--data.fold leave"),
        (["--task.metrik", "map"], "task.metrik task.metric"),
    ],
)
def test_bad_input(more, message, tagged, tmp_path, refused):
    assert has(refused(main, *words(tagged, tmp_path, "bad", "labels"), *more), message)
    assert not (tmp_path / "bad").exists()
