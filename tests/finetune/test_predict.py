"""`finetune/predict.py`: the same numbers as an evaluation, streaming, annotated copies, bad input."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs.errors import UserError
from data.sources import digits as digit_images
from finetune.predict import main
from models.opening import open_weights
from models.weights import save
from tests.conftest import ROOT, has, names
from tests.data.helpers import as_folder
from tests.finetune.test_evaluate import autoencoder, call, classifier, evaluated, with_classes


@pytest.fixture(scope="module")
def best(digits, tmp_path_factory):
    return classifier(digits, tmp_path_factory.mktemp("weights") / "best.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Digits of class 3 as files."""
    images = {name: data for name, (data, split, label) in digit_images().items() if (split, label) == ("val", "3")}
    return as_folder(images, tmp_path_factory.mktemp("images"))


def objects(path) -> dict[str, list]:
    return {row["path"]: row["classes"] for row in json.loads(path.read_bytes())}


def test_the_numbers_of_an_evaluation(best, digits, tmp_path):
    """All validation images, once from shards and once from files."""
    _, rows = evaluated(best, digits, tmp_path / "evaluation")
    folder = as_folder({row["name"]: digit_images()[row["name"]][0] for row in rows}, tmp_path / "in")
    call(main, best, folder, "--json", tmp_path / "x.json")
    found = objects(tmp_path / "x.json")
    assert len(found) == len(rows) == 355
    for row in rows:
        classes = found[str(folder / row["name"])]
        assert [item["name"] for item in classes] == [row[f"top{i}"] for i in range(1, 6)]
        assert classes[0]["probability"] == pytest.approx(float(row["confidence"]), abs=1e-6)


def test_console_and_files_agree(best, folder, tmp_path, capsys):
    """Also for other types and channels; probabilities sum to 1."""
    gray = Image.open(next(folder.rglob("*.png")))
    gray.save(tmp_path / "b.bmp")
    gray.convert("RGBA").save(tmp_path / "c.tif")
    np.save(tmp_path / "d.npy", np.asarray(gray))
    paths = [gray.filename, *(tmp_path / name for name in ("b.bmp", "c.tif", "d.npy"))]
    call(main, best, *paths, "--top", "20", "--batch", "3", "--csv", tmp_path / "x.csv", "--json", tmp_path / "x.json")
    lines = capsys.readouterr().out.splitlines()
    found = objects(tmp_path / "x.json")
    table = list(csv.reader(io.StringIO((tmp_path / "x.csv").read_text())))
    assert table[0][:3] == ["path", "class1", "probability1"] and len(table[0]) == 21
    for line, row, (path, classes), expected in zip(lines, table[1:], found.items(), paths, strict=True):
        shown = ", ".join(f"{item['name']} {100 * item['probability']:.1f} %" for item in classes)
        assert line == f"{expected}: {shown}" and row[0] == path == str(expected)
        assert row[1:] == [str(value) for item in classes for value in item.values()]
        shares = [item["probability"] for item in classes]
        assert sum(shares) == pytest.approx(1, abs=1e-6) and shares == sorted(shares, reverse=True)
        assert shares == pytest.approx([item["probability"] for item in found[str(paths[0])]], abs=1e-6)


def test_paths_from_standard_input_batch_by_batch(best, folder):
    """Two lines are answered before the third is written. File names may contain any bytes."""
    first, second = sorted(folder.rglob("*.png"))[:2]
    odd = Path(shutil.copy(first, folder / os.fsdecode(b"caf\xe9.png")))
    one, two, other = (os.fsencode(path) for path in (first, second, odd))
    command = [sys.executable, "finetune/predict.py", best, "-", "--batch", "2", "--top", "1", "--device", "cpu"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as process:
        process.stdin.write(one + b"\n" + other + b"\n")
        lines = [process.stdout.readline() for _ in range(2)]
        assert [line.split(b": ")[0] for line in lines] == [one, other.replace(b"\xe9", b"\\xe9")]
        rest, _ = process.communicate(two)
        assert rest.startswith(two + b": ") and process.returncode == 0
    odd.unlink()


def test_annotated_copies(best, folder, tmp_path):
    call(main, best, folder, folder, "--annotate", tmp_path / "out", "--top", "3")
    stems = sorted(path.stem for path in folder.rglob("*.png"))
    assert names(tmp_path / "out") == {f"{i + 1:05}-{stem}.png" for i, stem in enumerate(stems * 2)}
    with Image.open(tmp_path / "out" / f"00001-{stems[0]}.png") as copy:
        assert copy.width == 256 and copy.height > 256


def test_names_from_a_file(best, folder, tmp_path, capsys):
    weights = with_classes(best, tmp_path / "x.pt", None)
    (tmp_path / "names.txt").write_text("\n".join(f"Ziffer {i}" for i in range(10)) + "\n")
    call(main, weights, next(folder.rglob("*.png")), "--classes", tmp_path / "names.txt", "--top", "1")
    assert ": Ziffer " in capsys.readouterr().out


def test_the_averaged_weights(best, folder, tmp_path, capsys):
    image = next(folder.rglob("*.png"))
    call(main, best, image)
    expected = capsys.readouterr().out
    weights = open_weights(best).weights
    weights.ema = weights.encoder | weights.head
    weights.head = {name: tensor * 0 for name, tensor in weights.head.items()}
    save(tmp_path / "last.pt", weights)
    call(main, tmp_path / "last.pt", image, "--ema")
    assert capsys.readouterr().out == expected


def test_unreadable_pictures_are_reported_and_skipped(best, folder, tmp_path, capsys):
    (tmp_path / "cut.png").write_bytes(next(folder.rglob("*.png")).read_bytes()[:50])
    np.save(tmp_path / "five.npy", np.zeros((8, 8, 5), np.uint8))
    with pytest.raises(UserError, match=rf"^2 of {len([*folder.rglob('*.png')]) + 2} images"):
        call(main, best, tmp_path / "cut.png", folder, tmp_path / "five.npy", "--json", tmp_path / "x.json")
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == len(objects(tmp_path / "x.json")) == len([*folder.rglob("*.png")])
    cut, five = err.splitlines()
    assert cut.startswith(f"error: {tmp_path / 'cut.png'}: ")
    assert five.startswith(f"error: {tmp_path / 'five.npy'}: ") and has(five, "5 model.channels 1")


def test_no_file_of_any_type_stops_the_others(best, folder, tmp_path, capsys):
    heic, text, scan = (tmp_path / name for name in ("a.heic", "notes.txt", "scan.npy"))
    heic.write_bytes(b"\0\0\0\x1cftypheic" + bytes(40))
    text.write_text("no picture")
    np.save(scan, np.full((8, 8), -5, np.int16))
    with pytest.raises(UserError, match=r"^3 of 4 images"):
        call(main, best, heic, text, scan, next(folder.rglob("*.png")))
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 1
    for line, words in zip(
        err.splitlines(), ("a.heic damaged", "notes.txt known", "scan.npy --value-range"), strict=True
    ):
        assert has(line, words)
    call(main, best, scan, "--value-range", "-10", "0")
    assert capsys.readouterr().out.startswith(f"{scan}: ")
    with pytest.raises(UserError, match="--pages is all"):
        call(main, best, scan, "--pages", "all")


def test_a_table_without_rows_has_its_columns(best, tmp_path):
    (tmp_path / "cut.png").write_bytes(b"cut")
    with pytest.raises(SystemExit):
        call(main, best, tmp_path / "cut.png", "--top", "2", "--csv", tmp_path / "x.csv")
    assert (tmp_path / "x.csv").read_text() == "path,class1,probability1,class2,probability2\n"


def test_a_damaged_picture_alone_is_one_line(best, tmp_path, capsys):
    (tmp_path / "cut.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(SystemExit) as end:
        call(main, best, tmp_path / "cut.jpg")
    out, err = capsys.readouterr()
    assert end.value.code == 2 and not out
    assert len(err.splitlines()) == 1 and err.startswith(f"error: {tmp_path / 'cut.jpg'}: ")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["{unnamed}", "{image}"], "unnamed names --classes"),
        (["{unnamed}", "{image}", "--classes", "{text}"], "text.txt 2 {unnamed} 10"),
        (["{best}", "{image}", "--size", "33"], "data.size 33x33 patch"),
        (["{best}", "{text}"], "text.txt jpg, jpeg, png,"),
        (["{best}", "{empty}"], "empty jpg, jpeg, png,"),
        (["{best}", "nowhere.png"], "nowhere.png exist"),
        (["{best}", "{image}", "-"], "- standard input"),
        (["{best}", "{image}", "--top", "0"], "--top 0"),
        (["{best}", "{image}", "--csv", "nowhere/x.csv"], "nowhere folder"),
        (["{fcmae}", "{image}"], "fcmae classifier"),
        (["{best}"], "required IMAGE"),
    ],
)
def test_bad_input(more, message, best, folder, tmp_path):
    place = {"best": best, "image": next(folder.rglob("*.png")), "text": tmp_path / "text.txt"}
    place |= {name: tmp_path / name for name in ("unnamed", "empty", "fcmae")}
    place["text"].write_text("a\nb\n")
    place["empty"].mkdir()
    autoencoder(place["fcmae"])
    with_classes(best, place["unnamed"], None)
    with pytest.raises(UserError) as error:
        call(main, *(word.format(**place) for word in more))
    assert has(error.value, message.format(**place)) and "\n" not in str(error.value)
