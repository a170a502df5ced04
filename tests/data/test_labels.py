"""Labels from tables and from known data sets."""

import io
import json
import tarfile
from dataclasses import replace

import numpy as np
import pytest
from pyarrow import Table, parquet
from scipy.io import savemat

from configs.errors import UserError
from data import prepare
from data.shard_index import read_index, write_index
from data.shards import Split
from data.vectors import all_targets, reader
from tests.conftest import has
from tests.data.helpers import as_folder, as_ilsvrc, as_tar, collection, picture
from tests.data.test_layouts import refusal, sizes
from tests.data.test_prepare import content, prepared

IMAGES = {f"images/{i}.jpg": picture(i) for i in range(4)}


def samples(folder, split="train") -> dict[str, dict]:
    """The json of each sample of a split, by name."""
    found = {}
    for path in folder.glob(f"{split}-*.tar"):
        with tarfile.open(path) as tar:
            for name in tar.getnames():
                if name.endswith("json"):
                    about = json.loads(tar.extractfile(name).read())
                    found[about["name"]] = about
    return found


def write(path, rows: list[dict]):
    """Rows as a file of labels of the type that its name says."""
    kind, columns = path.suffix[1:], list(rows[0])
    if kind == "parquet":
        parquet.write_table(Table.from_pylist(rows), path)
    elif kind == "jsonl":
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    else:
        lines = [columns, *([str(row[c]) for c in columns] for row in rows)]
        path.write_text("".join(f"{('	' if kind == 'tsv' else ',').join(line)}\r\n" for line in lines), "utf-8-sig")
    return path


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_tables(kind, tmp_path, capsys):
    rows = [{"image_id": i, "Label": "ab"[i % 2], "split": "valid" if i > 1 else "train"} for i in range(4)]
    table = write(tmp_path / f"labels.{kind}", rows)
    prepared(as_folder(IMAGES, tmp_path / "in"), tmp_path / "out", "--labels", table)
    assert read_index(tmp_path / "out").classes == ["a", "b"]
    assert content(tmp_path / "out") == {picture(0): 0, picture(1): 1}
    assert content(tmp_path / "out", "val") == {picture(2): 0, picture(3): 1}
    assert has(capsys.readouterr().out, f"labels from column Label of labels.{kind} 4 of 4 images")


@pytest.mark.parametrize("form", ["images/{}.jpg", "{}.jpg", "{}", "./images/{}.jpg", "/data/x/images/{}.jpg",
                                  "images\\{}.jpg", "{}.png"])  # fmt: skip
def test_how_rows_name_images(form, tmp_path):
    rows = [{"file": form.format(i), "class": "ab"[i % 2]} for i in range(4)]
    source, table = as_folder(IMAGES, tmp_path / "in"), write(tmp_path / "x.csv", rows)
    if form.endswith("png"):
        assert has(refusal(source, tmp_path / "out", "--labels", table), "x.csv no row names an image 0.jpg 0.png")
        return
    prepared(source, tmp_path / "out", "--labels", table)
    assert content(tmp_path / "out") == {picture(i): i % 2 for i in range(4)}


def test_images_without_rows_and_rows_without_images(tmp_path, capsys):
    rows = [{"file": f"{i}.jpg", "label": "x" if i % 2 else "y"} for i in (0, 1, 2, 7, 8)]
    source = as_folder(IMAGES, tmp_path / "in")
    prepared(source, tmp_path / "out", "--labels", write(tmp_path / "x.csv", rows))
    assert sizes(tmp_path / "out") == {"train": 3, "unlabeled": 1}
    assert content(tmp_path / "out", "unlabeled") == {picture(3): -1}
    out = capsys.readouterr().out
    assert has(out, "2 rows without an image, such as 7.jpg") and has(out, "1 image without a row images/3.jpg")


def test_a_split_without_rows_keeps_its_images(tmp_path, capsys):
    source = as_folder(collection({"train": 2, "test": 2}), tmp_path / "in")
    table = write(tmp_path / "x.csv", [{"file": f"train/{i}.jpg", "label": "ab"[i]} for i in range(2)])
    prepared(source, tmp_path / "out", "--labels", table)
    assert sizes(tmp_path / "out") == {"test": 2, "train": 2}
    assert "no rows for split test" in capsys.readouterr().out


def test_lines_of_paths_and_labels(tmp_path, capsys):
    source = as_folder(IMAGES, tmp_path / "in")
    (source / "list.txt").write_text("images/0.jpg 3\nimages/1.jpg 11\nimages/2.jpg 3\nimages/3.jpg 3\n")
    prepared(source, tmp_path / "out", "--labels", source / "list.txt")
    assert read_index(tmp_path / "out").classes == ["3", "11"]
    assert content(tmp_path / "out") == {picture(0): 0, picture(1): 1, picture(2): 0, picture(3): 0}
    assert "ignored" not in capsys.readouterr().out


def test_labels_and_other_targets_of_json_lines(tmp_path):
    rows = [{"file": "0.jpg", "label": "a", "boxes": [[1, 2, 3, 4]], "labels": ["a", "z"]}]
    source = as_folder({"0.jpg": picture(0)}, tmp_path / "in")
    prepared(source, tmp_path / "out", "--labels", write(tmp_path / "x.jsonl", rows))
    about = {"name": "0.jpg", "class": "a", "boxes": [[1, 2, 3, 4]], "labels": ["a", "z"]}
    assert samples(tmp_path / "out") == {"0.jpg": about} and content(tmp_path / "out") == {picture(0): 0}


def test_a_table_beside_the_images_is_pointed_out(tmp_path, capsys):
    source = as_folder(IMAGES | {"labels.csv": b"file,label\n0.jpg,a\n", "one.csv": b"hello\n"}, tmp_path / "in")
    prepared(source, tmp_path / "out")
    out = capsys.readouterr().out
    assert has(out, "labels.csv looks like labels: add --labels") and "one.csv looks" not in out
    assert read_index(tmp_path / "out").classes is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a,b\n0.jpg,x\n", "x.csv --path-column a, b"),
        ("file,colour\n0.jpg,x\n", "x.csv --label-column file, colour"),
        ("file,label,class\n0.jpg,x,y\n", "label, class --label-column"),
        ("0.jpg,x\n1.jpg,y\n", "no header file,label"),
        ("file,label\n0.jpg\n", "row 2 has 1 cells"),
        ("file,file\n0.jpg,1\n", "two columns"),
        ("", "empty"),
        ("file,label\n", "no rows"),
        ("file,label,split\n0.jpg,x,fold1\n", "split fold1 train"),
        ("id,file,label\n1,0.jpg,x\n", "id, file --path-column"),
        ("file,label\n0.jpg,.5\n1.jpg,1.5\n2.jpg,n/a\n", "column label n/a is no number leave it empty"),
        ("file,label\n0.jpg,.5\n1.jpg,1.5\n2.jpg,inf\n", "column label inf is no number"),
        ("file;label\n0.jpg;0,5\n1.jpg;1,5\n", "column label 0,5 1.5 a|b"),
        ("file,label\n0.jpg,.5\n0.jpg,1.5\n", "0.jpg 0.5 and 1.5 remove one row"),
    ],
)
def test_tables_that_are_refused(text, words, tmp_path):
    (tmp_path / "x.csv").write_text(text)
    message = refusal(as_folder(IMAGES, tmp_path / "in"), tmp_path / "out", "--labels", tmp_path / "x.csv")
    assert has(message, words), message


def test_options_name_the_columns(tmp_path):
    table = write(tmp_path / "x.csv", [{"id": 3 - i, "file": f"{i}.jpg", "a": "ab"[i % 2], "b": i} for i in range(4)])
    source = as_folder(IMAGES, tmp_path / "in")
    options = ["--labels", table, "--path-column", "file", "--label-column"]
    prepared(source, tmp_path / "out", *options, "a")
    assert content(tmp_path / "out") == {picture(i): i % 2 for i in range(4)}
    with pytest.raises(UserError, match=r"another data set .*content.*label_column"):
        prepared(source, tmp_path / "out", *options, "b")
    assert has(refusal(source, tmp_path / "no", *options, "c"), "no column c id, file, a, b")


def test_a_name_that_fits_two_images(tmp_path):
    source = as_folder(collection({"a": 1, "b": 1}), tmp_path / "in")
    table = write(tmp_path / "x.csv", [{"file": "0.jpg", "label": "x"}])
    assert has(refusal(source, tmp_path / "out", "--labels", table), "0.jpg may be a/0.jpg or b/0.jpg")


@pytest.mark.parametrize(
    ("columns", "rows", "targets"),
    [
        (["tags"], [["a|b"], ["c"]], [{"labels": ["a", "b"]}, {"labels": ["c"]}]),
        (["age"], [["0.5"], ["3"]], [{"numbers": [0.5]}, {"numbers": [3.0]}]),
        (["x", "y"], [["1.5", "2"], ["3", ""]], [{"numbers": [1.5, 2.0]}, {"numbers": [3.0, None]}]),
        (["cat", "dog"], [["1.0", "0"], ["1", "1"]], [{"labels": ["cat"]}, {"labels": ["cat", "dog"]}]),
        (["colour", "size"], [["red", "big"], ["blue", "s"]], [{"labels": ["red", "big"]}, {"labels": ["blue", "s"]}]),
    ],
)  # fmt: skip
def test_several_labels_and_numbers_are_kept_for_other_tasks(columns, rows, targets, tmp_path, capsys):
    lines = [{"file": f"{i}.jpg"} | dict(zip(columns, row, strict=True)) for i, row in enumerate(rows)]
    table = write(tmp_path / "x.csv", lines)
    images = {f"{i}.jpg": picture(i) for i in range(2)}
    prepared(as_folder(images, tmp_path / "in"), tmp_path / "out", "--labels", table, "--label-column", *columns)
    assert read_index(tmp_path / "out").classes is None and set(content(tmp_path / "out").values()) == {-1}
    assert [about for _, about in sorted(samples(tmp_path / "out").items())] == [
        {"name": f"{i}.jpg"} | found for i, found in enumerate(targets)
    ]
    kind = next(iter(targets[0]))
    names = sorted({label for found in targets for label in found["labels"]}) if kind == "labels" else columns
    assert read_index(tmp_path / "out").targets == {"kind": kind, "names": names}
    assert f"for --task.name {kind}" in capsys.readouterr().out


def test_no_label_is_a_target_and_a_missing_cell_is_none(tmp_path, capsys):
    rows = [{"file": "0.jpg", "tags": ["b", "a"]}, {"file": "1.jpg", "tags": []}, {"file": "2.jpg", "tags": None}]
    rows += [{"file": "3.jpg", "tags": ["b", "b"]}]
    source = as_folder(IMAGES, tmp_path / "in")
    prepared(source, tmp_path / "out", "--labels", write(tmp_path / "x.jsonl", rows), "--label-column", "tags")
    found = samples(tmp_path / "out")
    assert [found[f"images/{i}.jpg"].get("labels") for i in range(4)] == [["b", "a"], [], None, ["b"]]
    split = Split(tmp_path / "out", "train")
    targets = all_targets(split, reader("labels", ["a", "b"], ["a", "b"]), 2)
    assert sorted(map(str, targets.tolist())) == ["[0.0, 0.0]", "[0.0, 1.0]", "[1.0, 1.0]", "[nan, nan]"]
    assert has(capsys.readouterr().out, "2 labels: b 2, a 1; 1 image with none of them; 1 image without")


def test_numbers_of_json_files_and_their_preview(tmp_path, capsys):
    about = [{"numbers": {"age": 3, "mass": 0.5}}, {"numbers": {"mass": 1.5}}, {"numbers": {"age": None}}, {}]
    files = {f"{i}.json": json.dumps(content).encode() for i, content in enumerate(about)}
    source = as_folder({f"{i}.jpg": picture(i) for i in range(4)} | files, tmp_path / "in")
    prepared(source, tmp_path / "out")
    assert read_index(tmp_path / "out").targets == {"kind": "numbers", "names": ["age", "mass"]}
    found = samples(tmp_path / "out") | samples(tmp_path / "out", "unlabeled")
    assert [found[f"{i}.jpg"].get("numbers") for i in range(4)] == [[3.0, None], [None, 1.5], None, None] or [
        found[f"{i}.jpg"].get("numbers") for i in range(4)
    ] == [[3.0, 0.5], [None, 1.5], None, None]
    out = capsys.readouterr().out
    assert has(out, "train age: 3 to 3, mean 3, 2 missing") and has(out, "mass: 0.5 to 1.5, mean 1, 1 missing")


@pytest.mark.parametrize(
    ("content", "words"),
    [({"labels": 3.5}, "0.jpg labels 3.5"), ({"labels": [["a"]]}, "labels"), ({"numbers": ["x"]}, "numbers x finite")],
)
def test_targets_of_another_type_are_refused(content, words, tmp_path):
    files = {"0.jpg": picture(0), "0.json": json.dumps(content).encode()}
    assert has(refusal(as_folder(files, tmp_path / "in"), tmp_path / "out"), words)


def test_a_second_run_lists_targets_that_an_older_version_did_not(tmp_path, capsys):
    table = write(tmp_path / "x.csv", [{"file": f"{i}.jpg", "tags": "a|b"} for i in range(4)])
    args = as_folder(IMAGES, tmp_path / "in"), tmp_path / "out", "--labels", table, "--label-column", "tags"
    prepared(*args)
    index = read_index(tmp_path / "out")
    write_index(tmp_path / "out", replace(index, targets=None))
    prepared(*args)
    assert read_index(tmp_path / "out") == index and index.targets["names"] == ["a", "b"]
    prepared(*args)
    assert "complete already" in capsys.readouterr().out


def test_targets_of_other_tools_are_indexed(tmp_path):
    content = [{"labels": ["x"]}, {"labels": []}]
    files = {f"{i}.jpg": picture(i) for i in range(2)}
    files |= {f"{i}.json": json.dumps(about).encode() for i, about in enumerate(content)}
    (tmp_path / "tars").mkdir()
    as_tar(dict(sorted(files.items())), tmp_path / "tars/train-0.tar")
    prepare.main([str(tmp_path / "tars"), "--index", "--workers", "1"])
    assert read_index(tmp_path / "tars").targets == {"kind": "labels", "names": ["x"]}


def test_rows_with_other_labels_of_one_image(tmp_path, capsys):
    rows = [("0.jpg", "a"), ("0.jpg", "b"), ("1.jpg", "a"), ("1.jpg", "a")]
    table = write(tmp_path / "x.csv", [{"file": name, "label": label} for name, label in rows])
    images = {f"{i}.jpg": picture(i) for i in range(2)}
    prepared(as_folder(images, tmp_path / "in"), tmp_path / "out", "--labels", table)
    assert content(tmp_path / "out") == {picture(0): -1, picture(1): 0}
    assert [samples(tmp_path / "out")[f"{i}.jpg"]["labels"] for i in range(2)] == [["a", "b"], ["a"]]
    assert "1 image with rows of several labels" in capsys.readouterr().out


WNIDS = {490: "n01751748", 361: "n09193705", 171: "n02105855"}
VAL = {f"ILSVRC2012_val_0000000{i}.JPEG": picture(50 + i) for i in (1, 2, 3)}
TRUTH = b"490\n361\n171\n"
LABELS = {picture(51): 0, picture(52): 2, picture(53): 1}  # n01751748 < n02105855 < n09193705


def meta() -> bytes:
    """The devkit's meta.mat of three classes and an inner node."""
    out, kind = io.BytesIO(), [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("num_children", "O")]
    rows = [(float(number), wnid, 0.0) for number, wnid in WNIDS.items()]
    savemat(out, {"synsets": np.array([*rows, (1001.0, "n00000001", 2.0)], kind).reshape(-1, 1)})
    return out.getvalue()


def imagenet(path):
    """The tars of ILSVRC2012 and its devkit, with three images a split."""
    path.mkdir()
    as_ilsvrc(
        {f"{wnid}/0.JPEG": picture(i) for i, wnid in enumerate(WNIDS.values())}, path / "ILSVRC2012_img_train.tar"
    )
    as_tar(VAL, path / "ILSVRC2012_img_val.tar")
    (path / "ILSVRC2012_validation_ground_truth.txt").write_bytes(TRUTH)
    kit = {"meta.mat": meta(), "ILSVRC2012_validation_ground_truth.txt": TRUTH}
    as_tar({f"ILSVRC2012_devkit_t12/data/{name}": data for name, data in kit.items()},
           path / "ILSVRC2012_devkit_t12.tar.gz", "w:gz")  # fmt: skip
    return path


@pytest.mark.parametrize("labels", ["devkit", "text with the devkit", "text with meta.mat", "text of WNIDs", "csv"])
def test_imagenet_with_its_validation_split(labels, tmp_path):
    folder = imagenet(tmp_path / "in")
    file = folder / "ILSVRC2012_validation_ground_truth.txt"
    if labels == "devkit":
        file = folder / "ILSVRC2012_devkit_t12.tar.gz"
    elif labels != "text with the devkit":
        (folder / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    if labels == "text with meta.mat":
        (folder / "meta.mat").write_bytes(meta())
    elif labels == "text of WNIDs":
        file.write_text("".join(f"{WNIDS[int(line)]}\n" for line in TRUTH.split()))
    elif labels == "csv":
        file = folder / "LOC_val_solution.csv"
        file.write_bytes(SOLUTION)
    args = ["--val", folder / "ILSVRC2012_img_val.tar", "--val-labels", file]
    prepared(folder / "ILSVRC2012_img_train.tar", tmp_path / "out", *args)
    assert sizes(tmp_path / "out") == {"train": 3, "val": 3}
    assert read_index(tmp_path / "out").classes == sorted(WNIDS.values())
    assert content(tmp_path / "out", "val") == LABELS
    prepared(folder / "ILSVRC2012_img_train.tar", tmp_path / "out", *args)  # complete


SOLUTION = b"ImageId,PredictionString\n" + b"".join(
    b"ILSVRC2012_val_0000000%d,%s 1 2 3 4 %s 5 6 7 8 \n" % (i, wnid.encode(), wnid.encode())
    for i, wnid in enumerate(WNIDS.values(), 1)
)


def test_the_devkits_numbers_are_not_guessed(tmp_path):
    folder = imagenet(tmp_path / "in")
    (folder / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    truth = folder / "ILSVRC2012_validation_ground_truth.txt"
    args = ["--val", folder / "ILSVRC2012_img_val.tar", "--val-labels", truth]
    message = refusal(folder / "ILSVRC2012_img_train.tar", tmp_path / "out", *args)
    assert has(message, "own order ILSVRC2012_devkit_t12.tar.gz meta.mat")
    (folder / "meta.mat").write_bytes(meta())
    truth.write_bytes(TRUTH[:8])
    assert has(refusal(folder / "ILSVRC2012_img_train.tar", tmp_path / "out", *args), "2 lines image 3")
    truth.write_bytes(b"490\n1001\n171\n")
    assert has(refusal(folder / "ILSVRC2012_img_train.tar", tmp_path / "out", *args), "1001 is not the number")
    (folder / "meta.mat").write_bytes(b"no mat")
    assert has(refusal(folder / "ILSVRC2012_img_train.tar", tmp_path / "out", *args), "meta.mat cannot be read")


def test_a_folder_of_the_imagenet_tars_names_the_command(tmp_path):
    message = refusal(imagenet(tmp_path / "in"), tmp_path / "out")
    assert has(message, "ILSVRC2012_img_train.tar give it as SOURCE --val")


@pytest.mark.parametrize("source", [".", "ILSVRC", "ILSVRC/Data/CLS-LOC"])
def test_kaggles_layout(source, tmp_path, capsys):
    place = "ILSVRC/Data/CLS-LOC"
    files = {f"{place}/train/{wnid}/{wnid}_0.JPEG": picture(i) for i, wnid in enumerate(WNIDS.values())}
    files |= {f"{place}/val/{name}": data for name, data in VAL.items()}
    files |= {f"{place}/test/ILSVRC2012_test_00000001.JPEG": picture(99), "LOC_val_solution.csv": SOLUTION}
    files |= {"ILSVRC/Annotations/CLS-LOC/val/x.xml": b"<x/>"}
    prepared(as_folder(files, tmp_path / "in") / source, tmp_path / "out")
    assert sizes(tmp_path / "out") == {"test": 1, "train": 3, "val": 3}
    assert content(tmp_path / "out", "val") == LABELS and content(tmp_path / "out", "test") == {picture(99): -1}
    assert {tuple(map(tuple, about["boxes"])) for about in samples(tmp_path / "out", "val").values()} == {
        ((1, 2, 3, 4), (5, 6, 7, 8))
    }
    assert has(capsys.readouterr().out, "labels from LOC_val_solution.csv: 3 of 3")


def test_tiny_imagenet(tmp_path, capsys):
    root = "tiny-imagenet-200"
    files = {f"{root}/train/{wnid}/images/{wnid}_0.JPEG": picture(i) for i, wnid in enumerate(WNIDS.values())}
    files |= {f"{root}/train/{wnid}/{wnid}_boxes.txt": b"x" for wnid in WNIDS.values()}
    files |= {f"{root}/val/images/val_{i}.JPEG": picture(50 + i) for i in (1, 2, 3)}
    lines = "".join(f"val_{i}.JPEG\t{wnid}\t0\t32\t44\t62\n" for i, wnid in enumerate(WNIDS.values(), 1))
    files |= {f"{root}/val/val_annotations.txt": lines.encode(), f"{root}/test/images/test_0.JPEG": picture(99)}
    prepared(as_folder(files, tmp_path / "in"), tmp_path / "out")
    assert read_index(tmp_path / "out").classes == sorted(WNIDS.values())
    assert content(tmp_path / "out", "val") == LABELS and content(tmp_path / "out", "test") == {picture(99): -1}
    out = capsys.readouterr().out
    assert has(out, "labels from val_annotations.txt: 3 of 3") and "3 files ignored: 3 .txt" in out


def test_further_sources_are_splits(tmp_path, capsys):
    train = as_folder(collection({"a": 2, "b": 1}), tmp_path / "train")
    val = as_folder({"x/b/0.jpg": picture(60), "x/c/1.jpg": picture(61)}, tmp_path / "val")
    test = as_tar({"0.jpg": picture(70)}, tmp_path / "test.tar.gz", "w:gz")
    table = write(tmp_path / "t.csv", [{"file": "0", "label": "a"}])
    args = ["--val", val, "--test", test, "--test-labels", table]
    prepared(train, tmp_path / "out", *args)
    assert read_index(tmp_path / "out").classes == ["a", "b", "c"]
    assert content(tmp_path / "out", "val") == {picture(60): 1, picture(61): 2}
    assert content(tmp_path / "out", "test") == {picture(70): 0}
    assert has(capsys.readouterr().out, "warning: c of split val not in train")
    prepared(train, tmp_path / "out", *args)
    assert "complete already" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"another data set .*val was"):
        prepared(train, tmp_path / "out")
    split = as_folder(collection({"train/a": 1, "val/a": 1}), tmp_path / "both")
    assert has(refusal(split, tmp_path / "no", "--val", val), "--val has a split val already")
    assert has(refusal(train, tmp_path / "no", "--val-labels", table), "no split val --val SOURCE")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--splits", "train=a", "--no-splits"], "--splits --no-splits"),
        (["--no-labels", "--labels", "x.csv"], "--no-labels --labels"),
        (["--val", "x", "--val-fraction", "0.1"], "--val --val-fraction"),
    ],
)
def test_options_that_exclude_each_other(args, words):
    with pytest.raises(UserError) as error:
        prepare.parse(["a", "b", *args])
    assert has(error.value, words)
