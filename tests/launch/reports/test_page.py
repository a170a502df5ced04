"""The report of a run: its content, and its rendering in a real browser."""

import base64
import json
import re
import subprocess

import numpy as np
import pytest
from PIL import Image

from configs.errors import UserError
from launch.reports.page import CURVES, curves_of, write_report
from tests.conftest import has, run

HOSTILE = "<script>document.title='broken'</script>"


@pytest.fixture
def finished(tmp_path):
    """Folder of a finished fine-tuning run."""
    folder = tmp_path / "cats & dogs"
    folder.mkdir()
    (folder / "config.yaml").write_text(
        f"run: {{name: 'cats & dogs'}}\naugment: {{}}\neval_split: val\ndata: {{path: \"{HOSTILE}\"}}\n"
    )
    lines = [{"step": i, "loss": 2 - i / 50, "lr": 1e-3, "grad_norm": 1.0, "images_per_s": 90.0} for i in range(1, 51)]
    for epoch in (1, 2, 3):
        for kind in ("raw", "ema"):
            score = {"top1": 0.3 * epoch, "top5": 0.99, "loss": 1 / epoch, "images": 40}
            lines.append({"step": 16 * epoch, f"val_{kind}": score})
    lines += [{"step": i, "skipped": {"not_finite": "loss", "samples": [i]}} for i in range(12)]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 51, "lo')
    best = {"epoch": 3, "weights": "ema", "top1": 0.9, "top5": 0.99, "loss": 0.33, "images": 40}
    (folder / "summary.json").write_text(
        json.dumps(
            {
                "stage": "fine-tuning",
                "epoch": 3,
                "epochs": 3,
                "init": HOSTILE,
                "best": best,
                "last": {},
                "shown": "top-1 90.00%",
            }
            | {"seconds": 3700, "hardware": "a processor, 2 cores"}
        )
    )
    (folder / "best.pt").write_bytes(b"")
    Image.fromarray(np.full((60, 80, 3), (200, 30, 30), np.uint8)).save(folder / "confusion.png")
    return folder


def test_what_is_on_the_page(finished):
    page = write_report(finished).read_text()
    assert "1:01:40 on a processor, 2 cores" in page
    assert "90.00%, in epoch 3 of 3 (averaged weights)" in page and has(page, "1.9800 1.0000")
    assert "12 skipped steps and damaged images" in page and page.count("&#34;not_finite&#34;") in (0, 10)
    assert page.count("<svg") == 6 and "predict.py" in page and HOSTILE not in page
    assert base64.b64encode((finished / "confusion.png").read_bytes()).decode() in page


def test_nothing_comes_from_elsewhere(finished):
    page = write_report(finished).read_text()
    links = re.findall(r"""(?:src|href|url\()\s*=?\s*["']?([^"')\s>]+)""", page)
    assert links and all(link.startswith(("data:", "#")) for link in links), links
    assert "<script" not in page and "<link" not in page


def test_curves():
    lines = [
        {"step": 1, "loss": 2.0},
        {"step": 2, "knn": {"top1_k20": 0.5}, "val_raw": {"top1": 0.25}},
        {"step": 3, "loss": 1},
    ]
    plots = curves_of(lines)
    assert plots["loss"] == {"training": ([1, 3], [2.0, 1])}
    assert plots["nearest neighbours, top-1"] == {"k = 20": ([2], [0.5])}
    assert plots["top-1 accuracy"] == {"raw weights": ([2], [0.25])} and set(plots) <= set(CURVES)


def test_scores_and_pictures_of_any_task(finished):
    with (finished / "log.jsonl").open("w") as file:
        file.writelines(json.dumps({"step": i, "val_ema": {"error": -i, "images": 9}}) + "\n" for i in (1, 2))
    summary = json.loads((finished / "summary.json").read_text())
    summary |= {"shown": "error 2.0", "best": {"epoch": 2, "weights": "raw", "error": -2.0}}
    (finished / "summary.json").write_text(json.dumps(summary))
    (finished / "confusion.png").rename(finished / "errors.png")
    page = write_report(finished).read_text()
    assert "error 2.0, in epoch 2 of 3 (raw weights)" in page and ">errors.png</figcaption>" in page
    assert curves_of([{"step": 1, "val_ema": {"error": -1, "images": 9}}]) == {"error": {"moving average": ([1], [-1])}}


@pytest.mark.parametrize(("objective", "reconstructs"), [("fcmae", True), ("blur", False)])
def test_the_commands_after_any_objective(objective, reconstructs, tmp_path):
    (tmp_path / "config.yaml").write_text(
        f"run: {{name: x}}\ndata: {{path: shards/x}}\nobjective: {{name: {objective}}}\n"
    )
    (tmp_path / f"{objective}.pt").write_bytes(b"")
    following = {
        "stage": "pretraining",
        "seconds": 1,
        "hardware": "x",
        "next": ["why", "next: python finetune/main.py --a b"],
    }
    (tmp_path / "summary.json").write_text(json.dumps(following))
    page = write_report(tmp_path).read_text()
    assert "python finetune/main.py --a b" in page and "probe.py" in page and ("reconstruct.py" in page) == reconstructs


def test_a_run_that_has_only_begun(tmp_path):
    (tmp_path / "config.yaml").write_text("run: {name: x}\ndata: {path: shards/x}\n")
    assert "shards/x" in write_report(tmp_path).read_text()


def test_no_run(tmp_path):
    with pytest.raises(UserError, match=r"config\.yaml"):
        write_report(tmp_path)


def test_of_a_pretraining_run(pretrained):
    page = (pretrained / "report.html").read_text()
    assert "data:image/png" in page and f"--init {pretrained}/fcmae.pt" in page and "feature distance" in page
    done = run("python", "launch/report.py", pretrained)
    assert done.stdout == f"wrote {pretrained}/report.html\n" and (pretrained / "report.html").read_text() == page


@pytest.mark.browser
def test_in_a_browser(finished, tmp_path):
    page, picture = write_report(finished), tmp_path / "page.png"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    flags += ["--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path}/profile"]
    flags += ["--window-size=1100,2400", "--hide-scrollbars", f"--screenshot={picture}", "--force-color-profile=srgb"]
    subprocess.run(["chromium", *flags, page.as_uri()], check=True, capture_output=True, timeout=120)
    pixels = np.asarray(Image.open(picture).convert("RGB")).astype(int)
    red = (np.abs(pixels - (200, 30, 30)) < 8).all(2)
    assert red.sum() == 60 * 80  # the confusion matrix, as large as it is
    blue = (np.abs(pixels - (0x3B, 0x6F, 0xD4)) < 40).all(2)
    assert blue.sum() > 500  # curves
    dom = subprocess.run(
        ["chromium", *flags[:-3], "--dump-dom", page.as_uri()], check=True, capture_output=True, timeout=120
    )
    assert b"<title>cats &amp; dogs: fine-tuning</title>" in dom.stdout  # names and paths are not executed
