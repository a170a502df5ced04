"""The report of a run: its content, and its rendering in a real browser."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
from html import escape, unescape

import numpy as np
import pytest
from PIL import Image

from configs.errors import UserError
from data.sheets import Cell, Group, Sheet, write_sheet
from launch.reports.page import write_report
from tests.conftest import has, run

HOSTILE = "<script>document.title='broken'</script>"


@pytest.fixture
def finished(tmp_path):
    """Folder of a finished fine-tuning run."""
    folder = tmp_path / "cats & dogs"
    folder.mkdir()
    (folder / "config.yaml").write_text(
        "run: {name: 'cats & dogs'}\naugment: {}\ntask: {name: classification}\neval_split: val\n"
        f'data: {{path: "{HOSTILE}"}}\n'
    )
    start = {
        "steps_per_epoch": 16, "model": "convnextv2_atto", "parameters": 3_400_000, "classes": 3, "task": "3 classes",
        "images": {"train": 1442, "val": 40}, "precision": "fp32", "date": "2026-09-02T08:30:00+00:00",
        "versions": {"torch": "2.15.0"}, "commit": "abc-dirty",
    }  # fmt: skip
    again, values = start | {"date": "2026-09-03T08:30:00+00:00"}, {"lr": 1e-3, "grad_norm": 1.0, "images_per_s": 90.0}
    lines = [{"step": 0, "start": start}, {"step": 20, "start": again}]
    lines += [{"step": i, "loss": 2 - i / 50, **values} for i in range(1, 51)]
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
    facts = "convnextv2_atto, 3.4M parameters", "1,442 train, 40 val", ">fp32<", "torch 2.15.0", "abc, with changes"
    assert all(fact in page for fact in (*facts, "2 September 2026, 08:30 UTC, resumed 1 time")), facts
    assert base64.b64encode((finished / "confusion.png").read_bytes()).decode() in page


def test_nothing_comes_from_elsewhere(finished):
    page = write_report(finished).read_text()
    links = re.findall(r"""(?:src|href|url\()\s*=?\s*["']?([^"')\s>]+)""", page)
    links = [link for link in links if not link.startswith("&#39;")]  # of the policy
    assert links and all(link.startswith(("data:", "#")) for link in links), links
    assert "<link" not in page and "http:" not in page.replace("http://www.w3.org/", "")
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in unescape(page) and "default-src 'none'" in unescape(page)


def test_scores_and_pictures_of_any_task(finished):
    with (finished / "log.jsonl").open("w") as file:
        file.writelines(json.dumps({"step": i, "val_ema": {"error": -i, "images": 9}}) + "\n" for i in (1, 2))
    summary = json.loads((finished / "summary.json").read_text())
    summary |= {"shown": "error 2.0", "best": {"epoch": 2, "weights": "raw", "error": -2.0}}
    (finished / "summary.json").write_text(json.dumps(summary))
    (finished / "confusion.png").rename(finished / "errors.png")
    page = write_report(finished).read_text()
    assert "error 2.0, in epoch 2 of 3 (raw weights)" in page and ">errors.png</figcaption>" in page


@pytest.mark.parametrize(
    ("objective", "weights", "reconstructs"),
    [("fcmae", None, True), ("fcmae", "fcmae.pt", True), ("more", "fcmae.pt", True), ("blur", "blur.pt", False)],
)
def test_the_commands_after_any_objective(objective, weights, reconstructs, tmp_path):
    """Summaries of earlier versions do not name the weights, whose name is that of the objective."""
    (tmp_path / "config.yaml").write_text(
        f"run: {{name: x}}\ndata: {{path: shards/x}}\nobjective: {{name: {objective}}}\n"
    )
    (tmp_path / (weights or f"{objective}.pt")).write_bytes(b"")
    following = {
        "stage": "pretraining",
        "seconds": 1,
        "hardware": "x",
        "next": ["why", "next: python finetune/main.py --a b"],
    } | ({"weights": weights} if weights else {})
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


def test_runs_are_compared(finished, tmp_path):
    """Columns for runs, settings that differ, all curves in one plot."""
    other = tmp_path / "else/cats & dogs"
    shutil.copytree(finished, other)
    text = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(text + "layer_decay: 0.7\n")
    done = run("python", "launch/report.py", finished, other)
    assert done.stdout == f"wrote {tmp_path}/comparison.html\n"
    page = (tmp_path / "comparison.html").read_text()
    for name in (finished, other):
        assert page.count(f"<th>{escape(str(name))}</th>") == 3, name
    differences = page[page.index('id="differences"') :]
    differences = differences[: differences.index("</table>")]
    assert "layer_decay" in differences and "0.7" in differences and "eval_split" not in differences
    assert page.count("<svg") == 6 and "var(--series-2)" in page and HOSTILE not in page


def test_a_run_before_runs_were_described(finished):
    lines = [line for line in (finished / "log.jsonl").read_text().splitlines() if '"start"' not in line]
    (finished / "log.jsonl").write_text("\n".join(lines))
    page = write_report(finished).read_text()
    assert ">step</text>" in page and page.count("<svg") == 6


def test_sheets_are_taken_apart(finished):
    cells = [Cell(Image.new("RGB", (50, 40), (i, 9, 9)), (f"{HOSTILE} {i}",)) for i in range(3)]
    write_sheet(finished / "examples.png", Sheet([Group("A & B", cells)], "a note", [("#010203", "cat")]))
    page = write_report(finished).read_text()
    assert page.count("<figcaption>&lt;script&gt;") == 3 and "A &amp; B" in page and HOSTILE not in page
    assert base64.b64encode((finished / "examples.png").read_bytes()).decode() not in page
    assert 'fill="#010203"' in page and "a note" in page


FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--force-color-profile=srgb",
]  # fmt: skip


def chromium(folder, *flags) -> bytes:
    words = ["chromium", *FLAGS, f"--user-data-dir={folder}/profile", *map(str, flags)]
    return subprocess.run(words, check=True, capture_output=True, timeout=120).stdout


def near(pixels: np.ndarray, colour: str, distance: int = 8) -> int:
    """How many pixels have about a colour."""
    return int((np.abs(pixels - list(bytes.fromhex(colour))).max(2) < distance).sum())


@pytest.mark.browser
@pytest.mark.parametrize("dark", [False, True])
def test_in_a_browser(dark, finished, tmp_path):
    page, picture = write_report(finished), tmp_path / "page.png"
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    chromium(tmp_path, scheme, "--window-size=1100,2400", f"--screenshot={picture}", page.as_uri())
    pixels = np.asarray(Image.open(picture).convert("RGB")).astype(int)
    assert near(pixels, "c81e1e") == 60 * 80  # the picture, as large as it is; it is no figure, so it is not inverted
    assert near(pixels, "56b4e9" if dark else "0072b2", 40) > 500  # curves
    assert near(pixels, "121212" if dark else "ffffff", 2) > pixels[..., 0].size / 2


@pytest.mark.browser
def test_a_phone_needs_no_sideways_scrolling(finished, tmp_path):
    """Names and paths are not executed; the page's own script is."""
    page = write_report(finished)
    probe = """document.title += ` ${document.documentElement.scrollWidth <= innerWidth}`;
        const button = document.querySelector("button.copy");
        button.click();
        setTimeout(() => { document.title += ` ${button.textContent}` }, 300)"""
    digest = base64.b64encode(hashlib.sha256(probe.encode()).digest()).decode()
    text = page.read_text().replace("script-src ", f"script-src 'sha256-{digest}' ")
    page.write_text(text.replace("</body>", f"<script>{probe}</script></body>"))
    flags = "--window-size=390,844", "--virtual-time-budget=2000", "--dump-dom"
    title = re.search("<title>(.*)</title>", chromium(tmp_path, *flags, page.as_uri()).decode())[1]
    assert title.startswith("cats &amp; dogs: fine-tuning true") and title.split()[-1] in ("copied", "Ctrl+C"), title
