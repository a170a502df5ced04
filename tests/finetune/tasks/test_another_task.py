"""A task with a head and a score of its own: trained, then used by the commands."""

import json

import onnxruntime

from models.opening import open_weights
from tests.conftest import QUICK, ROOT, run

TASK = """
from torch import nn

from finetune.tasks import classification
from finetune.tasks.classification import scores
from finetune.tasks.classification.task import ClassifierTask
from models.convnext import ConvNeXt
from models.start import start_encoder
from models.weights import load_strict


class Head(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.out = nn.Linear(dim, 10)

    def forward(self, x):
        return self.out(x.mean((1, 2)))


class Predictions(scores.Predictions):
    def scores(self):
        return {"negative_loss": -2.0 - float(self.loss.mean())}


class Task(ClassifierTask):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.metric = "negative_loss"

    def build(self, arch):
        model = ConvNeXt(arch)
        model.head = Head(arch.dims[-1])
        return model

    def load(self, model, init):
        if init:
            start_encoder(model, init)

    def join(self, parts):
        return Predictions(**vars(super().join(parts)))

    def restore(self, state):
        return Predictions(**state)

    def format(self, scores):
        return f"loss {-scores['negative_loss']:.3f}"

    def draw(self, folder, found):
        (folder / "drawn.txt").write_text(str(len(found.label)))


def make_inference(trained):
    trained.model.head = Head(trained.weights.arch.dims[-1]).eval()
    load_strict(trained.model, trained.weights.encoder | trained.weights.head, trained.path)
    found = classification.make_inference(trained)
    found.outputs = lambda: {"sums": "float32 [batch, 10]"}
    return found


Settings, make_task = classification.Settings, Task
"""
SCRIPT = """
import runpy, sys

sys.path[:0] = [ROOT, HERE]
import sums
from finetune.tasks import TASKS

TASKS["sums"] = sums
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_task_with_its_own_head_and_a_negative_score(digits, pretrained, tmp_path):
    """Scores below -1 count too, averaged weights too, and the file holds a head that is no classifier."""
    script, best = tmp_path / "with_task.py", tmp_path / "x/best.pt"
    (tmp_path / "sums.py").write_text(TASK)
    script.write_text(SCRIPT.replace("ROOT", repr(str(ROOT))).replace("HERE", repr(str(tmp_path))))
    words = ["--task.name", "sums", "--data.path", digits, "--run.folder", tmp_path, "--run.name", "x", *QUICK]
    words += ["--init", pretrained / "fcmae.pt", "--run.max_steps", "2", "--augment.ema", "0.5"]
    done = run("python", script, "finetune/main.py", *words)
    assert "(best)" in done.stdout and (tmp_path / "x/drawn.txt").read_text() == "355"
    summary = json.loads((tmp_path / "x/summary.json").read_text())
    assert summary["best"]["negative_loss"] < -2 and summary["shown"] in (tmp_path / "x/report.html").read_text()
    weights = open_weights(best).weights
    assert weights.task == "sums" and weights.head.keys() == {"head.out.weight", "head.out.bias"}
    assert open_weights(tmp_path / "x/last.pt").weights.ema.keys() == (weights.encoder | weights.head).keys()

    again = run("python", script, "finetune/main.py", *words)  # finished: restored from its checkpoint
    assert f"loss {-summary['best']['negative_loss']:.3f}" in again.stdout

    model = tmp_path / "x.onnx"
    run("python", script, "finetune/export.py", best, model, "--to", "onnx", "--images", digits)
    session = onnxruntime.InferenceSession(str(model))
    assert [output.name for output in session.get_outputs()] == ["sums"]
    more = ["--to", "safetensors", "--images", digits]
    done = run("python", script, "finetune/export.py", best, tmp_path / "x.safetensors", *more, code=2)
    assert "timm" in done.stderr
    done = run("python", "models/convert.py", best, tmp_path / "y.safetensors", "--to", "timm")
    assert "omitted: the head" in done.stdout
