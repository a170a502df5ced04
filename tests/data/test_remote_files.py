"""Sources and outputs of data/prepare.py at URLs: the bytes that local ones give; faults, secrets, resuming."""

import shutil
from pathlib import Path
from urllib import request

import boto3
import pytest
from moto.server import ThreadedMotoServer

from configs.errors import UserError
from data import prepare, remote, remote_files
from data.cache import RemoteUserError
from data.planning import Part, PrepareOptions, ShardPlan
from data.remote_files import Upload, open_binary
from data.shards import Split
from data.sources import Item
from data.writing import write_shard
from tests.conftest import has, names
from tests.data.helpers import as_folder, as_ilsvrc, as_tar, as_zip, collection, picture
from tests.data.server import Server
from tests.data.test_prepare import prepared

PHOTOS = {**collection({"cat": 9, "dog": 5}), "dog/x.jpg": b"\xff\xd8\xffdamaged"}
OPTIONS = ("--shard-size", "4", "--no-labels")
MAKERS = {
    "x.tar": as_tar,
    "x.zip": as_zip,
    "x.tar.gz": lambda images, path: as_tar(images, path, "w:gz"),
    "ILSVRC2012_img_train.tar": as_ilsvrc,
}


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(remote, "BACKOFF_SECONDS", 0.02)


@pytest.fixture
def server(tmp_path):
    (tmp_path / "www").mkdir()
    with Server(tmp_path / "www") as running:
        yield running


@pytest.fixture
def s3(monkeypatch):
    """A client of an S3 server with a bucket named `bucket`."""
    running = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    running.start()
    keys = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}
    address = "http://{}:{}".format(*running.get_host_and_port())
    for key, value in {**keys, "AWS_ENDPOINT_URL": address}.items():
        monkeypatch.setenv(key, value)
    remote_files._files.cache_clear()  # of another test's server
    request.urlopen(request.Request(f"{address}/moto-api/reset", method="POST")).close()  # moto's buckets are global
    client = boto3.client("s3")
    client.create_bucket(Bucket="bucket")
    yield client
    client.close()
    running.stop()


def shards(folder: Path) -> dict[str, bytes]:
    """The shards and skipped.txt; source.json and index.json differ in the time stamps of the source."""
    return {name: (folder / name).read_bytes() for name in names(folder) if name.endswith((".tar", ".npy", ".txt"))}


def objects(s3, prefix: str) -> dict[str, bytes]:
    found = s3.list_objects_v2(Bucket="bucket", Prefix=f"{prefix}/").get("Contents", [])
    bodies = {entry["Key"]: s3.get_object(Bucket="bucket", Key=entry["Key"])["Body"].read() for entry in found}
    return {key.removeprefix(f"{prefix}/"): body for key, body in bodies.items()}


@pytest.mark.parametrize("name", MAKERS)
def test_archives_at_a_web_server(name, server, tmp_path):
    file = MAKERS[name](PHOTOS, tmp_path / "www" / name)
    prepared(file, tmp_path / "local", *OPTIONS)
    server.faults[name] = [503, "cut"]  # retried
    prepared(f"{server.url}/{name}", tmp_path / "out", *OPTIONS, "--workers", "2")
    assert len(shards(tmp_path / "local")) >= 9 and shards(tmp_path / "out") == shards(tmp_path / "local")
    assert not [name for name in names(tmp_path / "out") if name.startswith(".")]


def test_a_server_that_sends_whole_files_only(server, tmp_path):
    as_tar(PHOTOS, tmp_path / "www/x.tar")
    server.ranges = False
    with pytest.raises(UserError, match=r"x\.tar: its server sends whole files only: download it"):
        prepared(f"{server.url}/x.tar", tmp_path / "out", *OPTIONS)
    assert not (tmp_path / "out").exists()


def test_an_image_that_cannot_be_fetched_ends_the_run(s3, tmp_path):
    """It is not left out like a damaged one."""
    for name, data in PHOTOS.items():
        s3.put_object(Bucket="bucket", Key=f"photos/{name}", Body=data)
    prepared("s3://bucket/photos", tmp_path / "out", *OPTIONS)
    (tmp_path / "out/train-000001.tar").unlink()
    (tmp_path / "out/index.json").unlink()
    prepared("s3://bucket/photos", tmp_path / "out", *OPTIONS)
    shutil.rmtree(tmp_path / "out")
    for entry in s3.list_objects_v2(Bucket="bucket", Prefix="photos/cat")["Contents"]:
        s3.put_object(Bucket="bucket", Key=entry["Key"], Body=b"", StorageClass="GLACIER")
    with pytest.raises(UserError, match=r"s3://bucket/photos/cat/\d\.jpg"):
        prepared("s3://bucket/photos", tmp_path / "out", *OPTIONS)
    plan = ShardPlan(tmp_path / "x.tar", [Part(Item("a.jpg", "s3://bucket/photos/a.jpg", "5 x"), None, 0, range(1))])
    with pytest.raises(RemoteUserError, match=r"^s3://bucket/photos/a\.jpg does not exist: check SOURCE$"):
        write_shard(plan, PrepareOptions(source="s3://bucket/photos", out="out"), None)
    assert not (tmp_path / "x.tar").exists()


@pytest.mark.parametrize("kind", ["images", "tars"])
def test_folders_of_images_and_of_tars(kind, s3, tmp_path, capsys):
    local = tmp_path / "photos"
    if kind == "images":
        as_folder({**PHOTOS, "a b/ü#.jpg": PHOTOS["cat/0.jpg"]}, local)
    else:
        local.mkdir()
        for number in range(3):
            as_tar({f"{number}-{name}": data for name, data in collection({"": 5}).items()}, local / f"{number:05}.tar")
    for path in local.rglob("*.*"):
        s3.upload_file(str(path), "bucket", f"some/photos/{path.relative_to(local)}")
    prepared(local, tmp_path / "local", *OPTIONS)
    s3.put_object(Bucket="bucket", Key="some/photos/x.csv", Body=b"file,label\n0.jpg,a\n")
    prepared("s3://bucket/some/photos/", tmp_path / "out", "--shard-size", "4", "--workers", "2", "--no-splits")
    assert (kind == "tars") or "x.csv looks like labels: fetch it and add --labels PATH" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "out")
    prepared("s3://bucket/some/photos/", tmp_path / "out", *OPTIONS, "--workers", "2")
    assert shards(tmp_path / "out") == shards(tmp_path / "local")
    with pytest.raises(UserError, match=r"^s3://bucket/none has no image|does not exist"):
        prepared("s3://bucket/none", tmp_path / "other", *OPTIONS)
    s3.put_object(Bucket="bucket", Key="some/photos/cat/0.jpg", Body=b"other")
    if kind == "images":
        with pytest.raises(UserError, match="another data set"):
            prepared("s3://bucket/some/photos", tmp_path / "out", *OPTIONS)


@pytest.mark.parametrize("kind", ["folder", "tar", "masks elsewhere"])
def test_tiles_with_masks(kind, s3, tmp_path):
    """Tiles are cut from parts of the remote file."""
    images = {f"images/{i}.png": picture(i, (50, 70), kind="png") for i in range(2)}
    images["images/2.tif"] = picture(2, (90, 40), kind="tiff")
    masks = {f"labels/{i}.png": picture(i, size, "L", "png") for i, size in enumerate([(50, 70), (50, 70), (90, 40)])}
    (tmp_path / "names").write_text("".join(f"{i}\n" for i in range(255)))
    options = ("--tile", "32", "--shard-size", "5", "--mask-classes", tmp_path / "names", "--masks")
    local = as_folder(images | masks, tmp_path / "all")
    prepared(local, tmp_path / "local", *options, "labels")
    if kind == "tar":
        s3.upload_file(str(as_tar(images | masks, tmp_path / "x.tar")), "bucket", "x.tar")
    else:
        for name, data in (images | masks).items():
            s3.put_object(Bucket="bucket", Key=f"all/{name}", Body=data)
    source = {"folder": "s3://bucket/all", "tar": "s3://bucket/x.tar", "masks elsewhere": "s3://bucket/all/images"}[
        kind
    ]
    more = "s3://bucket/all/labels" if kind == "masks elsewhere" else "labels"
    prepared(source, tmp_path / "out", *options, more)
    assert len(Split(tmp_path / "out", "train")) >= 15
    if kind == "masks elsewhere":  # its images have other names
        assert len(Split(tmp_path / "out", "train")) == len(Split(tmp_path / "local", "train"))
    else:
        assert shards(tmp_path / "out") == shards(tmp_path / "local")


@pytest.mark.parametrize("lost", ["tile", "mask", "mask of a tile"])
def test_a_part_that_cannot_be_fetched_ends_the_run(lost, s3, tmp_path):
    """Neither a tile nor a mask that is out of reach is left out like a damaged one."""
    (tmp_path / "names").write_text("a\nb\n")
    (tmp_path / "a.png").write_bytes(picture(0, (50, 70), kind="png"))
    gone = Item("x.png", "s3://bucket/x.png", "500 x")
    item = gone if lost == "tile" else Item("a.png", str(tmp_path / "a.png"), "9 9", mask=gone)
    options = PrepareOptions(
        source="x", out="out", masks="labels", mask_classes=tmp_path / "names", tile=None if lost == "mask" else 32
    )
    with pytest.raises(RemoteUserError, match=r"^s3://bucket/x\.png does not exist: check SOURCE$"):
        write_shard(ShardPlan(tmp_path / "x.tar", [Part(item, None, 0, range(1))]), options, None)
    assert not (tmp_path / "x.tar").exists()


def test_the_next_command_after_shards_at_a_url(s3, tmp_path, capsys, monkeypatch):
    """The plan is not made at once: it would fetch what was just uploaded."""
    source = as_folder(PHOTOS, tmp_path / "photos")
    monkeypatch.setattr("sys.argv", ["prepare.py", str(source), "s3://bucket/out/", "--workers", "1", *OPTIONS])
    prepare.prepare_and_plan()
    told = capsys.readouterr().out.splitlines()[-1]
    assert told.startswith("next: ") and told.endswith("launch/plan.py s3://bucket/out")


def test_shards_at_a_url(s3, tmp_path, capsys):
    source = as_folder(PHOTOS, tmp_path / "photos")
    prepared(source, tmp_path / "local", *OPTIONS)
    prepared(source, "s3://bucket/out/", *OPTIONS, "--workers", "2")
    found = objects(s3, "out")
    assert found == {name: (tmp_path / "local" / name).read_bytes() for name in names(tmp_path / "local")}
    assert has(capsys.readouterr().out, "s3://bucket/out/preview.png s3://bucket/out/skipped.txt")
    prepared(source, "s3://bucket/out", *OPTIONS)
    assert "s3://bucket/out is complete already" in capsys.readouterr().out
    s3.delete_object(Bucket="bucket", Key="out/train-000001.tar")
    s3.put_object(Bucket="bucket", Key="out/train-000002.tar", Body=b"short")
    s3.delete_object(Bucket="bucket", Key="out/train-000003.idx.npy")
    prepared(source, "s3://bucket/out", *OPTIONS)
    told = capsys.readouterr().out
    assert told.count("rewriting it") == 3 and has(
        told, "000001.tar is missing: 000002.tar has 5 bytes 000003.tar has no"
    )
    assert objects(s3, "out") == found
    with pytest.raises(UserError, match=r"^s3://bucket/out has another data set \(shard_size was 4, is 5\)"):
        prepared(source, "s3://bucket/out", "--shard-size", "5", "--no-labels")
    with pytest.raises(UserError, match="--repair"):
        prepared(source, "s3://bucket/out", *OPTIONS, "--repair")


def test_an_interrupted_upload_is_resumed(s3, tmp_path, monkeypatch):
    source, pushed = as_folder(PHOTOS, tmp_path / "photos"), []
    prepared(source, tmp_path / "local", *OPTIONS)

    class Interrupted(Upload):
        def push(self, *paths):
            if len(pushed) == 4:
                raise KeyboardInterrupt
            pushed.append(paths)
            super().push(*paths)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("data.writing.add_progress", lambda images: None)
        patch.setattr("data.build.Upload", Interrupted)
        patch.setattr("data.build.run_tasks", lambda write, plans, *_: [write(plan) for plan in plans])
        prepared(source, "s3://bucket/out", *OPTIONS)
    assert "index.json" not in objects(s3, "out") and ".train-000001.record.json" in objects(s3, "out")
    written = s3.head_object(Bucket="bucket", Key="out/train-000001.tar")["LastModified"]
    prepared(source, "s3://bucket/out", *OPTIONS)
    assert s3.head_object(Bucket="bucket", Key="out/train-000001.tar")["LastModified"] == written
    found = objects(s3, "out")
    assert found == {name: (tmp_path / "local" / name).read_bytes() for name in names(tmp_path / "local")}


@pytest.mark.parametrize(
    ("source", "out", "message"),
    [
        ("https://me:secret@host/x.tar", "out", "https://***@host/x.tar netrc"),
        ("s3://me:secret@bucket/x", "out", "s3://***@bucket/x credentials"),
        ("https://host/x.tar?signature=secret", "out", "https://host/x.tar?*** query"),
        ("https://host/folder", "out", "https://host/folder archive"),
        ("ftp://host/x.tar", "out", "SOURCE ftp"),
        ("photos", "https://host/out", "OUT s3 folder"),
        ("photos", "s3://me:secret@bucket/out", "s3://***@bucket/out credentials"),
        ("photos", "s3://bucket/out?key=secret", "s3://bucket/out?*** query"),
    ],
)
def test_urls_that_are_refused(source, out, message, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    as_folder(PHOTOS, tmp_path / "photos")
    line = refused(prepare.main, source, out)
    assert has(line, message) and "secret" not in line
    assert names(tmp_path) == {"photos"}


def test_any_part_of_a_remote_file(server, tmp_path):
    data = bytes(range(256)) * 40
    (tmp_path / "www/x").write_bytes(data)
    with open_binary(f"{server.url}/x", 700) as file:
        for start, size in ((0, 10), (5000, 3000), (100, 1), (10235, 100), (20000, 5), (3, 10240)):
            file.seek(start)
            assert file.read(size) == data[start : start + size]


@pytest.mark.slow
def test_ray_from_s3_to_s3(s3, tmp_path):
    """No node needs a file of another one; credentials are those of the nodes, so the cluster starts here."""
    cluster_utils = pytest.importorskip("ray.cluster_utils", reason="tests on Ray need it: pip install ray")
    for name, data in PHOTOS.items():
        s3.put_object(Bucket="bucket", Key=f"photos/{name}", Body=data)
    prepared("s3://bucket/photos", tmp_path / "local", *OPTIONS)
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    try:
        prepared("s3://bucket/photos", "s3://bucket/out", *OPTIONS, "--ray", cluster.address)
    finally:
        cluster.shutdown()
    found = objects(s3, "out")
    assert found == {name: (tmp_path / "local" / name).read_bytes() for name in names(tmp_path / "local")}
