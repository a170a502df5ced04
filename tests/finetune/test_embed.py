"""`finetune/embed.py`: the features of the probe, ranks, order, damage, interruption, bad input."""

import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from configs.errors import UserError
from configs.schema import Data, Run
from data.folder import open_images
from data.transforms import EvalTransform
from finetune import embed, embedding, feature_file
from finetune.feature_file import read_features
from launch.training.feature_eval import features, probe_loader
from launch.training.world import destroy_world, init_world
from models.opening import open_encoder, open_weights
from models.weights import save
from tests.conftest import has, names, run_ranks
from tests.data.helpers import as_folder, collection, picture
from tests.data.test_prepare import prepared
from tests.finetune.test_evaluate import autoencoder, call

CLASSES = collection({"cat": 5, "dog": 4})
PHOTOS = {f"{split}/{name}": data for split in ("train", "val") for name, data in CLASSES.items()}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    return autoencoder(tmp_path_factory.mktemp("weights") / "fcmae.pt")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return as_folder(PHOTOS, tmp_path_factory.mktemp("photos") / "photos")


def embedded(weights, source, out, *more):
    """The columns of the written file, as a dict of lists."""
    call(embed.main, weights, source, out, "--workers", "0", *more)
    return pq.read_table(out).to_pydict()


def test_the_features_of_the_probe(weights, photos, tmp_path):
    prepared(photos, tmp_path / "shards", "--shard-size", "4")
    found = embedded(weights, tmp_path / "shards", tmp_path / "x.parquet", "--batch", "4")
    trained, split = open_encoder(str(weights)), open_images(str(tmp_path / "shards"), "train")
    world = init_world(Run(device="cpu"))
    transform = EvalTransform.of(trained.preprocessing)
    loader = probe_loader(split, None, transform, 3, Data(workers=0), 4, world)
    expected = features(trained.model, loader, world, trained.mean, trained.std, "fp32", lambda steps, *_: steps)
    destroy_world()
    assert np.array_equal(np.array(found["feature"], np.float32), expected.x.numpy())
    assert found["sample"] == list(range(9)) == expected.sample.tolist()
    assert found["label"] == [split.classes[i] for i in expected.label.tolist()]
    assert sorted(found["name"]) == sorted(name for name in PHOTOS if name.startswith("train"))
    assert found["label"] == [name.split("/")[1] for name in found["name"]]


def test_a_folder_with_splits(weights, photos, tmp_path):
    found = embedded(weights, photos, tmp_path / "x.parquet", "--split", "val", "train")
    assert found["name"] == [name for split in ("val", "train") for name in sorted(PHOTOS) if name.startswith(split)]
    assert found["split"] == ["val"] * 9 + ["train"] * 9 and found["sample"] == [*range(9), *range(9)]
    origin = read_features(tmp_path / "x.parquet").origin
    assert (origin.weights, origin.source, origin.size) == (str(weights), str(photos), (32, 32))


def test_two_ranks_write_the_bytes_of_one(weights, photos, tmp_path):
    """Also with a damaged image, and batches that one rank lacks."""
    source = shutil.copytree(photos, tmp_path / "photos")
    (source / "train/cat/2.jpg").write_bytes(b"damaged")
    more = ["--split", "train", "val", "--batch", "2", "--workers", "0", "--device", "cpu"]
    done = run_ranks(2, "finetune/embed.py", weights, source, tmp_path / "two.parquet", *more)
    assert has(done.stdout, "train/cat/2.jpg 17 images") and done.stdout.count("left out: ") == 1
    call(embed.main, weights, source, tmp_path / "one.parquet", *more)
    assert (tmp_path / "one.parquet").read_bytes() == (tmp_path / "two.parquet").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("shards", [False, True])
def test_two_nodes_of_ray_write_the_bytes_of_one_process(
    shards, cluster, weights, photos, tmp_path, monkeypatch, capfd
):
    """Also with damaged images, the first batch of a part among them, and with options of reading."""
    pytest.importorskip("finetune.ray_embedding")
    from finetune import ray_embedding

    source = shutil.copytree(photos, tmp_path / "photos")
    if shards:
        prepared(source, tmp_path / "shards", "--shard-size", "4")
        (tmp_path / "shards/train-000001.tar").write_bytes(bytes((tmp_path / "shards/train-000001.tar").stat().st_size))
        source = tmp_path / "shards"
    else:
        for name in ("train/cat/4.jpg", "train/dog/0.jpg", "val/dog/3.jpg"):
            (source / name).write_bytes(b"damaged")
        Image.fromarray(np.random.default_rng(0).random((16, 20), np.float32)).save(source / "train/cat/x.tif")
    monkeypatch.setattr(ray_embedding, "PART", 4)
    more = ["--split", "train", "val", "--batch", "2", "--device", "cpu"]
    more += [] if shards else ["--value-range", "0", "1"]
    call(embed.main, weights, source, tmp_path / "one.parquet", *more)
    alone = capfd.readouterr().err
    call(embed.main, weights, source, tmp_path / "two.parquet", *more, "--ray", cluster)
    assert (tmp_path / "one.parquet").read_bytes() == (tmp_path / "two.parquet").read_bytes()
    lost = [[line for line in text.splitlines() if "left out" in line] for text in (alone, capfd.readouterr().err)]
    assert len(lost[0]) >= 3 and lost[0] == lost[1]


def test_damaged_images_are_named_and_left_out(weights, tmp_path, capsys):
    images = collection({"": 5}) | {"1.jpg": b"damaged", "3.jpg": picture(3)[:300]}
    found = embedded(weights, as_folder(images, tmp_path / "in"), tmp_path / "x.parquet")
    assert found["name"] == ["0.jpg", "2.jpg", "4.jpg"] and found["sample"] == [0, 2, 4]
    assert found["label"] == [None] * 3
    told = capsys.readouterr()
    assert has(told.err, "1.jpg: 3.jpg:") and told.err.count("left out") == 2
    assert has(told.out, "2 damaged") and has(told.out, "3 images")


def test_row_groups_and_float16(weights, photos, tmp_path, monkeypatch):
    plain = embedded(weights, photos, tmp_path / "plain.parquet")
    monkeypatch.setattr(feature_file, "ROW_GROUP", 4)
    half = embedded(weights, photos, tmp_path / "half.parquet", "--dtype", "float16", "--batch", "6")
    groups = pq.ParquetFile(tmp_path / "half.parquet").metadata
    assert [groups.row_group(i).num_rows for i in range(groups.num_row_groups)] == [4, 4, 1]
    assert half["name"] == plain["name"]
    assert np.allclose(np.array(half["feature"], float), np.array(plain["feature"]), rtol=2e-3, atol=1e-4)
    assert read_features(tmp_path / "half.parquet").x.dtype == np.float16


def test_names_of_any_bytes(weights, tmp_path):
    raw = {os.fsdecode(b"\xe9.jpg"): picture(0), "a\nb.jpg": picture(1)}
    found = embedded(weights, as_folder(raw, tmp_path / "in"), tmp_path / "x.parquet")
    assert found["name"] == ["a\\u000ab.jpg", "\\xe9.jpg"]


def test_an_interrupted_run_leaves_no_file(weights, photos, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(feature_file.FeatureWriter, "add", interrupt)
    with pytest.raises(KeyboardInterrupt):
        embedded(weights, photos, tmp_path / "x.parquet")
    assert names(tmp_path) == set()


def changed(weights, path, **values):
    """A copy of weights with another preprocessing, or with a parameter that is not a number."""
    found = open_weights(weights).weights
    if values:
        found.preprocessing = replace(found.preprocessing, **values)
    else:
        found.encoder["stages.0.blocks.0.mlp.fc1.bias"][0] = torch.nan
    save(path, found)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["w.pt", "photos", "there.parquet"], "there.parquet exists"),
        (["w.pt", "photos", "nowhere/x.parquet"], "nowhere"),
        (["w.pt", "empty", "x.parquet"], "empty no image"),
        (["w.pt", "arrays", "x.parquet"], "none first 1 images 5 channels"),
        (["bare.pt", "photos", "x.parquet"], "bare.pt mean"),
        (["nan.pt", "photos", "x.parquet"], "nan.pt finite"),
        (["w.pt", "photos", "x.parquet", "--split", "test"], "photos test"),
        (["w.pt", "photos", "x.parquet", "--split", "val", "val"], "--split"),
        (["w.pt", "flat", "x.parquet", "--split", "train", "val"], "flat no split"),
        (["w.pt", "photos", "x.parquet", "--ema"], "averaged"),
    ],
)
def test_bad_input(words, message, weights, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(weights, "w.pt")
    changed(weights, tmp_path / "bare.pt", mean=None, std=None)
    changed(weights, tmp_path / "nan.pt")
    (tmp_path / "photos").symlink_to(photos)
    as_folder({"0.jpg": picture(0)}, tmp_path / "flat")
    (tmp_path / "empty").mkdir()
    (tmp_path / "arrays").mkdir()
    np.save("arrays/0.npy", np.zeros((8, 8, 5), np.uint8))
    (tmp_path / "there.parquet").touch()
    before = names(tmp_path)
    with pytest.raises(UserError) as error:
        call(embed.main, *words, "--workers", "0")
    assert has(error.value, message)
    assert names(tmp_path) == before


def test_batches_do_not_depend_on_the_ranks():
    alone = list(embedding.RunsOfSamples(range(11), 3, 0, 1))
    parts = [list(embedding.RunsOfSamples(range(11), 3, rank, 3)) for rank in range(3)]
    assert all(len(part) == 2 for part in parts)
    assert [batch for step in zip(*parts, strict=True) for batch in step] == [*alone, [(0, -1, 0)], [(0, -1, 0)]]
    ranges = range(6), range(6, 11)
    assert [batch for part in ranges for batch in embedding.RunsOfSamples(part, 3, 0, 1)] == alone


def test_a_value_that_float16_cannot_hold(tmp_path):
    origin = feature_file.Origin("w.pt", "", False, (8, 8), "fp32", "photos")
    with (
        pytest.raises(UserError, match=r"70000.*--dtype float32"),
        feature_file.feature_file(tmp_path / "x", 2, "float16", origin) as writer,
    ):
        writer.add(["a"], "train", [0], [None], np.array([[1, 70000]], np.float32))
    assert names(tmp_path) == set()


def test_the_origin_is_plain_json(weights, photos, tmp_path):
    embedded(weights, photos, tmp_path / "x.parquet")
    about = json.loads(pq.read_schema(tmp_path / "x.parquet").metadata[feature_file.KEY])
    assert about["format"] == feature_file.FORMAT and about["digest"] in open_weights(weights).digest
