"""`finetune/curate.py`: searches against plain code, real images, lists for data/prepare.py, bad input."""

import csv
import io
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_image
from sklearn.neighbors import NearestNeighbors

from configs.errors import UserError
from finetune import curate, curation, embed
from finetune.curation import balanced_subset, even_shares, find_duplicates, nearest_images, outlier_scores, unit_rows
from finetune.feature_file import Origin, feature_file, read_features
from models.formats.write import write_weights
from models.opening import open_weights
from models.weights import save
from tests.conftest import has
from tests.data.helpers import as_folder
from tests.data.test_prepare import content, prepared
from tests.finetune.test_evaluate import call
from tests.models.formats.helpers import SMALL, classifier

ORIGIN = Origin("w.pt", "0", False, (32, 32), "fp32", "photos")


def quiet(steps, *_):
    return steps


def random_features(images: int, copies: int = 0) -> torch.Tensor:
    """Features of length 1, the last ones nearly equal to earlier ones; in random order."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(images, 16))
    x[images - copies :] = x[rng.integers(0, images - copies, copies)] + rng.normal(size=(copies, 16)) * 0.05
    return unit_rows(rng.permutation(x).astype(np.float32), torch.device("cpu"))


def plain_duplicates(x: np.ndarray, threshold: float) -> dict[int, int]:
    """Image left out -> the one that remains."""
    kept, found = [], {}
    for i in range(len(x)):
        similarity = x[kept] @ x[i] if kept else np.array([-1.0])
        if similarity.max() >= threshold:
            found[i] = kept[similarity.argmax()]
        else:
            kept.append(i)
    return found


@pytest.mark.parametrize(("block", "bank"), [(1024, 1 << 16), (7, 5), (1, 1)])
def test_duplicates_in_blocks(block, bank, monkeypatch):
    monkeypatch.setattr(curation, "BLOCK", block)
    monkeypatch.setattr(curation, "BANK", bank)
    x = random_features(120, copies=60)
    row, partner, score = find_duplicates(x, 0.95, quiet)
    expected = plain_duplicates(x.numpy(), 0.95)
    assert 40 < len(expected) < 70
    assert dict(zip(row.tolist(), partner.tolist(), strict=True)) == expected
    assert score == pytest.approx([float(x[i] @ x[j]) for i, j in expected.items()], abs=1e-6)


def test_many_copies_of_one_image(monkeypatch):
    monkeypatch.setattr(curation, "BLOCK", 8)
    row, partner, _ = find_duplicates(random_features(1).repeat(50, 1), 1, quiet)
    assert row.tolist() == list(range(1, 50)) and set(partner.tolist()) == {0}
    assert outlier_scores(random_features(1).repeat(50, 1), 3, quiet) == pytest.approx(np.zeros(50), abs=1e-6)


def test_outliers_against_scikit_learn(monkeypatch):
    monkeypatch.setattr(curation, "QUERIES", 50)
    x = random_features(120)
    distance, _ = NearestNeighbors(n_neighbors=6, metric="cosine").fit(x.numpy()).kneighbors()
    assert outlier_scores(x, 6, quiet) == pytest.approx(distance.mean(1), abs=1e-5)


def test_nearest():
    x = random_features(50)
    row, score = nearest_images(x[3], x, 5, without=3)
    similarity = (x @ x[3]).numpy()
    assert row.tolist() == np.argsort(-similarity)[1:6].tolist()
    assert score == pytest.approx(similarity[row], abs=1e-6)
    assert nearest_images(x[3], x, 100)[0][0] == 3 and len(nearest_images(x[3], x, 100, without=3)[0]) == 49


def test_a_subset_is_balanced():
    """200 images of one kind, 20 and 5 of others: equal numbers of each, as far as they go."""
    centres, rng = np.eye(3, 8), np.random.default_rng(0)
    kind = rng.permutation(np.repeat([0, 1, 2], [200, 20, 5]))
    x = unit_rows((centres[kind] + rng.normal(size=(225, 8)) * 0.01).astype(np.float32), torch.device("cpu"))
    row, cluster, score = balanced_subset(x, 27, 3, seed=0)
    assert np.bincount(kind[row]).tolist() == [11, 11, 5] and len(set(row.tolist())) == 27
    assert len({(k, c) for k, c in zip(kind[row].tolist(), cluster.tolist(), strict=True)}) == 3
    assert score.min() > 0.9 and np.array_equal(row, balanced_subset(x, 27, 3, seed=0)[0])


def test_even_shares():
    assert even_shares([5, 100, 1], 20) == [5, 14, 1]
    assert even_shares([3, 3, 3], 8) == [2, 3, 3]
    rng = np.random.default_rng(0)
    for _ in range(200):
        sizes = rng.integers(0, 9, 5).tolist()
        total = int(rng.integers(0, sum(sizes) + 1))
        shares = even_shares(sizes, total)
        assert sum(shares) == total and all(0 <= a <= b for a, b in zip(shares, sizes, strict=True))
        unlimited = [a for a, b in zip(shares, sizes, strict=True) if a < b]
        assert not unlimited or max(shares) - min(unlimited) <= 1


def png(picture: Image.Image) -> bytes:
    out = io.BytesIO()
    picture.save(out, "png")
    return out.getvalue()


def spread(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Random weights that give different images different features."""
    shapes = {name: x.shape for name, x in model.state_dict().items()}
    weights = {name: torch.randn(shape) / shape[1:].numel() ** 0.5 for name, shape in shapes.items()}
    for name in weights:
        if weights[name].ndim == 1:
            weights[name].fill_(name.endswith(".weight"))
    return weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Weights, photographs (crops of one, a copy, a mirrored copy; another one), and their features."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("curate")
    write_weights(path / "w.pt", classifier(classes=0, fill=spread, **SMALL), "ours")
    china, flower = (Image.fromarray(load_sample_image(f"{name}.jpg")) for name in ("china", "flower"))
    images = {f"china/{i}.png": png(china.crop((i * 64, 0, i * 64 + 200, 200)).resize((64, 64))) for i in range(6)}
    first = Image.open(io.BytesIO(images["china/0.png"]))
    images["more/copy.png"] = png(first)
    images["more/mirrored.png"] = png(ImageOps.mirror(first))
    images["more/unrelated.png"] = png(flower.resize((64, 64)))
    as_folder(images, path / "photos")
    call(embed.main, path / "w.pt", path / "photos", path / "x.parquet", "--workers", "0", "--size", "64")
    return path


def listed(folder, out, *more) -> list[dict]:
    """Rows of the list that the command writes."""
    curate.main([str(folder / "x.parquet"), str(out), *map(str, more), "--device", "cpu"])
    with out.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_copy_and_a_mirrored_copy(folder, tmp_path, capsys):
    strict = listed(folder, tmp_path / "strict.csv", "--duplicates", "1")
    assert [(row["name"], row["remains"]) for row in strict] == [("more/copy.png", "china/0.png")]
    near = listed(folder, tmp_path / "near.csv", "--nearest", "china/0.png", "--k", "8")
    score = {row["name"]: float(row["score"]) for row in near}
    assert next(iter(score)) == "more/copy.png" and "china/0.png" not in score
    assert score["more/copy.png"] > score["more/mirrored.png"] > score["more/unrelated.png"]
    loose = listed(folder, tmp_path / "loose.csv", "--duplicates", score["more/mirrored.png"])
    assert {"more/copy.png", "more/mirrored.png"} <= {row["name"] for row in loose}
    assert "more/unrelated.png" not in {row["name"] for row in loose}
    assert [row["score"] for row in loose] == sorted((row["score"] for row in loose), key=float)
    assert has(capsys.readouterr().out, "loose.csv 9 near-duplicates")


def test_an_outlier_is_left_out_of_the_shards(folder, tmp_path):
    rows = listed(folder, tmp_path / "x.csv", "--outliers", "1", "--k", "2")
    assert [row["name"] for row in rows] == ["more/unrelated.png"]
    prepared(folder / "photos", tmp_path / "out", "--no-labels", "--without", tmp_path / "x.csv")
    names = sorted(path.relative_to(folder / "photos").as_posix() for path in (folder / "photos").rglob("*.png"))
    assert set(content(tmp_path / "out")) == {
        (folder / "photos" / name).read_bytes() for name in names if name != "more/unrelated.png"
    }


def test_a_subset_becomes_shards(folder, tmp_path):
    rows = listed(folder, tmp_path / "x.csv", "--subset", "4", "--clusters", "2")
    assert len({row["name"] for row in rows}) == 4 and {row["cluster"] for row in rows} == {"0", "1"}
    prepared(folder / "photos", tmp_path / "out", "--no-labels", "--only", tmp_path / "x.csv")
    found = set(content(tmp_path / "out"))
    assert found == {(folder / "photos" / row["name"]).read_bytes() for row in rows}


def test_a_file_as_query(folder, tmp_path):
    (tmp_path / "query.png").write_bytes((folder / "photos/more/unrelated.png").read_bytes())
    rows = listed(folder, tmp_path / "x.csv", "--nearest", tmp_path / "query.png", "--sheet", tmp_path / "x.png")
    assert rows[0]["name"] == "more/unrelated.png" and float(rows[0]["score"]) == pytest.approx(1, abs=1e-5)
    assert len(rows) == 9


def test_the_sheet_shows_pairs(folder, tmp_path):
    sheet = tmp_path / "x.png"
    listed(folder, tmp_path / "x.csv", "--duplicates", "1", "--sheet", sheet)
    with Image.open(sheet) as picture:
        left, right = (picture.crop((x, 8, x + 160, 168)) for x in (8, 176))
    assert left.tobytes() == right.tobytes() and len(set(left.get_flattened_data())) > 100
    listed(folder, tmp_path / "x.csv", "--nearest", "more/copy.png", "--sheet", sheet)
    with Image.open(sheet) as picture:
        assert picture.width == 6 * 168 + 8


def test_the_images_have_changed(folder, tmp_path):
    other = as_folder({"other.png": (folder / "photos/more/copy.png").read_bytes()}, tmp_path / "other")
    with pytest.raises(UserError, match=r"other, .*copy\.png.*--source"):
        listed(
            folder, tmp_path / "x.csv", "--nearest", "more/copy.png", "--sheet", tmp_path / "x.png", "--source", other
        )
    assert not (tmp_path / "x.csv").exists() and not (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--duplicates --outliers --subset --nearest"),
        (["--duplicates", "0.9", "--subset", "2"], "one of"),
        (["--duplicates", "1.5"], "--duplicates 1.5"),
        (["--outliers", "10"], "9 images --outliers"),
        (["--outliers", "1"], "9 images --k 10"),
        (["--subset", "10"], "9 images --subset 10"),
        (["--subset", "9", "--clusters", "10"], "9 images --clusters 10"),
        (["--nearest", "nowhere.png"], "nowhere.png name file"),
        (["--nearest", __file__, "--weights", "nowhere.pt"], "nowhere.pt"),
        (["--nearest", __file__], "test_curate.py"),
        (["--subset", "1", "--sheet", "nowhere/x.png"], "nowhere"),
    ],
)
def test_bad_input(words, message, folder, tmp_path):
    with pytest.raises(UserError) as error:
        listed(folder, tmp_path / "x.csv", *words)
    assert has(error.value, message)
    assert not (tmp_path / "x.csv").exists()


def test_other_weights(folder, tmp_path):
    weights = open_weights(folder / "w.pt").weights
    weights.encoder["stem.0.bias"] += 1
    save(tmp_path / "other.pt", weights)
    query = folder / "photos/more/copy.png"
    with pytest.raises(UserError, match=r"other\.pt differs"):
        listed(folder, tmp_path / "x.csv", "--nearest", query, "--weights", tmp_path / "other.pt")


def test_a_url_is_not_opened_because_a_file_names_it(tmp_path):
    table(tmp_path / "x.parquet", source="http://127.0.0.1:9/shards")
    with pytest.raises(UserError, match="--source"):
        listed(tmp_path, tmp_path / "x.csv", "--outliers", "1", "--k", "1", "--sheet", tmp_path / "x.png")


def table(path, x=((1, 0), (0, 1)), source="photos"):
    """A feature file of two images."""
    with feature_file(path, 2, "float32", replace(ORIGIN, source=source)) as writer:
        writer.add(["a", "b"], "train", [0, 1], [None] * 2, np.array(x, np.float32))


def test_files_that_are_not_ours(tmp_path):
    path = tmp_path / "x.parquet"
    table(path)
    assert read_features(path).names == ["a", "b"]
    good = pq.read_table(path)
    about, float64 = good.schema.metadata, good.schema.field("feature").with_type(pa.list_(pa.float64(), 2))
    nan = pa.FixedSizeListArray.from_arrays(pa.array([1, np.nan, 0, 1], pa.float32()), 2)
    files = {
        "was not written": good.replace_schema_metadata(None),
        "was not": good.replace_schema_metadata({key: value[:40] for key, value in about.items()}),
        "was": good.replace_schema_metadata(dict.fromkeys(about, b"[]")),
        "columns of": good.drop_columns(["split"]),
        "columns": good.set_column(4, "feature", pa.array([1, 2])),
        "other types": good.cast(good.schema.set(4, float64)),
        "missing values": good.set_column(0, "name", pa.array(["a", None])),
        "no images": good[:0],
        "not finite": good.set_column(4, good.schema.field("feature"), nan),
    }
    for message, other in files.items():
        pq.write_table(other, path)
        with pytest.raises(UserError, match=message):
            read_features(path)
    for data in (b"", b"PAR1", b"\x93NUMPY" * 9):
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"x\.parquet is not a readable Parquet file"):
            read_features(path)


def test_names_in_a_list_are_no_formulas(tmp_path):
    table(tmp_path / "x.parquet")
    found = pq.read_table(tmp_path / "x.parquet").set_column(0, "name", pa.array(["=1+1", "b"]))
    pq.write_table(found, tmp_path / "x.parquet")
    rows = listed(tmp_path, tmp_path / "x.csv", "--outliers", "2", "--k", "1")
    assert {row["name"] for row in rows} == {"'=1+1", "b"}
