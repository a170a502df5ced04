"""`data/prepare.py --repair`: damage is repaired, undamaged images are kept, lost ones listed, nothing else changes."""

import json
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from configs.errors import UserError
from data import prepare
from data.decode import decode
from data.index import index_folder, verify
from data.pool import Pool
from data.repair import repair
from data.shard_index import index_file, read_index
from data.shards import Split, find_damage
from data.tars import read_rows
from tests.conftest import names
from tests.data.helpers import as_folder, as_tar, collection, killed, picture
from tests.data.test_prepare import Payload, content, prepared, with_object

IMAGES = collection({"a": 8, "b": 8})


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with images, `in`, and with their shards, `out`: four shards of four images."""
    folder = tmp_path_factory.mktemp("made")
    prepared(as_folder(IMAGES, folder / "in"), folder / "out", "--shard-size", "4")
    return folder


@pytest.fixture
def shards(made, tmp_path) -> Path:
    return Path(shutil.copytree(made / "out", tmp_path / "out"))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def members(tar: Path) -> dict[str, tarfile.TarInfo]:
    with tarfile.open(tar) as archive:
        return {member.name: member for member in archive}


def change(path: Path, start: int, data: bytes) -> None:
    """Overwrite some bytes of a file."""
    whole = path.read_bytes()
    path.write_bytes(whole[:start] + data + whole[start + len(data) :])


def flip(path: Path, place: int) -> None:
    change(path, place, bytes([path.read_bytes()[place] ^ 1]))


def image(tar: Path, number: int) -> tarfile.TarInfo:
    """The member that holds the n-th image of a tar of ours."""
    return [member for name, member in members(tar).items() if name.endswith(".jpg")][number]


def place(tar: Path, number: int) -> int:
    return image(tar, number).offset_data + 99


FAULTS = {
    "flipped": lambda tar: flip(tar, place(tar, 1)),
    "cut": lambda tar: tar.write_bytes(tar.read_bytes()[: place(tar, 2)]),
    "missing": lambda tar: tar.unlink(),
    "index flipped": lambda tar: flip(index_file(tar), 150),
    "index cut": lambda tar: index_file(tar).write_bytes(index_file(tar).read_bytes()[:-1]),
    "index missing": lambda tar: index_file(tar).unlink(),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_repair_from_the_source_restores_every_byte(fault, made, shards, capsys):
    FAULTS[fault](shards / "train-000001.tar")
    prepared(made / "in", shards, "--repair", "--shard-size", "4")
    assert files(shards) == files(made / "out")
    assert "train-000001" in capsys.readouterr().out
    prepared(made / "in", shards, "--repair", "--shard-size", "4")
    assert "nothing is damaged" in capsys.readouterr().out


def test_skipped_images_stay_listed(tmp_path):
    """Also those of the shards that need not be written again."""
    source = as_folder(IMAGES | {f"a/: {i}: .jpg": b"" for i in range(4)}, tmp_path / "in")
    prepared(source, tmp_path / "out", "--shard-size", "4")
    before = files(tmp_path / "out")
    assert before["skipped.txt"].count(b"\n") == 4
    for tar in sorted((tmp_path / "out").glob("*.tar")):
        tar.unlink()
        prepared(source, tmp_path / "out", "--shard-size", "4")
        assert files(tmp_path / "out") == before


def test_nothing_is_damaged(made, shards, capsys):
    repair(shards, Pool(2))
    assert "nothing is damaged" in capsys.readouterr().out
    assert files(shards) == files(made / "out")


@pytest.mark.parametrize(
    "harm",
    [
        *(FAULTS[name] for name in FAULTS if name.startswith("index")),
        lambda tar: flip(tar, image(tar, 1).offset + 3),  # its name
        lambda tar: change(tar, image(tar, 1).offset, bytes(512)),
        lambda tar: change(tar, 0, bytes(512)),  # a label's header
        lambda tar: change(tar, image(tar, 1).offset - 512, bytes(1024)),  # a label and the header of its image
        lambda tar: change(tar, 0, bytes(image(tar, 0).offset_data)),  # everything before the first image
        lambda tar: tar.write_bytes(tar.read_bytes()[:-2000]),  # zeros after the last member
        lambda tar: tar.write_bytes(tar.read_bytes() + b"more"),
    ],
)
def test_damage_outside_the_images_is_repaired_exactly(harm, made, shards, capsys):
    harm(shards / "train-000001.tar")
    repair(shards, Pool(1))
    assert files(shards) == files(made / "out")
    output = capsys.readouterr().out
    assert "train-000001.tar: repaired, byte for byte" in output and "has changed" not in output


def test_salvage(made, shards, capsys):
    tar = shards / "train-000002.tar"
    rows, before = np.load(index_file(tar)), content(shards)
    gone, known = [Split(shards, "train").read(8 + i)[0] for i in (1, 3)], image(tar, 1).name.split(".")[0]
    digest = Split(shards, "train").digest
    flip(tar, int(rows["offset"][1]) + 70)
    change(tar, int(rows["offset"][3]) - 1024, bytes(1400))  # with label, header and the image's beginning
    with pytest.raises(UserError, match="1 of 4 shards"):
        verify(shards, Pool(1))
    capsys.readouterr()
    prepare.main([str(shards), "--repair", "--workers", "1"])
    output = capsys.readouterr().out
    for part in (
        f"{tar}: 2 of 4 images",
        f"2 images are lost, listed in {shards / 'lost.txt'}",
        f"`python data/prepare.py SOURCE {shards} --repair`",
        "split train has changed",
        "--run.name",
    ):
        assert part in output
    first, second = (shards / "lost.txt").read_text().splitlines()
    assert first == f"train-000002.tar: image 1, key '{known}', byte {rows['offset'][1]}"
    assert second.startswith("train-000002.tar: image 3, key '0") and second.endswith(f"byte {rows['offset'][3]}")
    assert content(shards) == {data: label for data, label in before.items() if data not in gone}
    assert Split(shards, "train").digest != digest
    assert not [name for name in names(shards) if name.startswith(".")]
    verify(shards, Pool(1))
    left, old = files(shards), files(made / "out")
    assert {name for name in old if left[name] != old[name]} == {tar.name, index_file(tar).name, "index.json"}
    prepared(made / "in", shards, "--shard-size", "4")  # brings them back, with --repair or without
    assert files(shards) == old


def test_a_second_salvage_adds_to_the_list(shards):
    for number in (0, 1):
        flip(shards / "train-000000.tar", place(shards / "train-000000.tar", number))
        repair(shards, Pool(1))
    assert len((shards / "lost.txt").read_text().splitlines()) == 2
    assert sum(shard.samples for shard in read_index(shards).splits["train"]) == 14


@pytest.mark.parametrize("harm", [lambda index: index.unlink(), lambda index: index.write_bytes(b"\x93NUMPY")])
def test_tar_and_index_damaged(harm, shards):
    """Truncated inside the third image: the two before it are kept, because they can be decoded."""
    tar, before = shards / "train-000001.tar", content(shards)
    lost = {Split(shards, "train").read(i)[0] for i in (6, 7)}
    FAULTS["cut"](tar)
    harm(index_file(tar))
    repair(shards, Pool(1))
    assert content(shards) == {data: label for data, label in before.items() if data not in lost}
    assert (shards / "lost.txt").read_text() == "train-000001.tar: 2 images, keys and bytes unknown\n"
    verify(shards, Pool(1))


def test_tar_and_index_damaged_with_headers_left(shards):
    """An undecodable image, a lost label, and damage before both: images that decode and have their label are kept."""
    tar, before = shards / "train-000001.tar", content(shards)
    kept = Split(shards, "train").read(7)
    change(tar, image(tar, 0).offset_data, bytes(300))
    change(tar, image(tar, 1).offset - 512, b"?")
    change(tar, image(tar, 2).offset, bytes(512))
    index_file(tar).unlink()
    repair(shards, Pool(1))
    found = content(shards)
    assert len(found) == 13 and found.items() <= before.items() and kept[0] in found
    verify(shards, Pool(1))


def test_missing_tars(shards, capsys):
    """They are removed from the index; if all are missing, nothing is changed."""
    (shards / "train-000003.tar").unlink()
    repair(shards, Pool(1))
    assert "train-000003.tar: 0 of 4 images" in capsys.readouterr().out
    assert len((shards / "lost.txt").read_text().splitlines()) == 4
    assert len(Split(shards, "train")) == 12
    for tar in shards.glob("*.tar"):
        tar.unlink()
    before = files(shards)
    with pytest.raises(UserError, match="no undamaged image, nothing was changed"):
        repair(shards, Pool(1))
    assert files(shards) == before


def test_a_split_that_is_lost(made, tmp_path, capsys):
    prepared(made / "in", tmp_path / "out", "--val-fraction", "0.2")
    (tmp_path / "out/val-000000.tar").unlink()
    repair(tmp_path / "out", Pool(1))
    assert list(read_index(tmp_path / "out").splits) == ["train"]
    assert "split val has changed" in capsys.readouterr().out


def test_foreign_shards(tmp_path):
    """Keys with folders, captions, masks with the type of an image: undamaged samples are kept with all members."""
    folder = tmp_path / "shards"
    folder.mkdir()
    samples = {}
    for i in range(5):
        mask = picture(i + 50, mode="L", kind="png")
        samples |= {f"./x/{i}.JPG": picture(i), f"./x/{i}.txt": b"%d" % i, f"./x/{i}.png": mask, f"./x/{i}.cls": b"03"}
    tar = as_tar(samples, folder / "x-7.tar")
    index_folder(folder, Pool(1))
    flip(tar, members(tar)["./x/1.JPG"].offset_data + 80)
    change(tar, members(tar)["./x/3.JPG"].offset, bytes(512))
    repair(folder, Pool(1))
    assert content(folder, "x") == {picture(i): 3 for i in (0, 2, 3, 4)}
    with tarfile.open(tar) as archive:
        found = {member.name: archive.extractfile(member).read() for member in archive}
    expected = {name.replace("JPG", "jpg"): data for name, data in samples.items() if "/1." not in name}
    assert found == {name: b"3" if name.endswith("cls") else data for name, data in expected.items()}
    assert (folder / "lost.txt").read_text().startswith("x-7.tar: image 1, key './x/1', byte ")


def test_splits_from_names_of_tars(tmp_path):
    """The words and numbers that other tools use."""
    for name in ("train-00000-of-00002", "train-00001-of-00002", "val_7", "test", "in-1k.003"):
        as_tar({"a.png": picture(0, kind="png")}, tmp_path / f"{name}.tar")
    index_folder(tmp_path, Pool(1))
    shards = {name: len(shards) for name, shards in read_index(tmp_path).splits.items()}
    assert shards == {"train": 2, "val": 1, "test": 1, "in-1k": 1}


def test_an_image_whose_name_is_lost(tmp_path):
    tar = as_tar({f"{i}.png": picture(i, kind="png") for i in range(3)}, tmp_path / "x-0.tar")
    index_folder(tmp_path, Pool(1))
    change(tar, members(tar)["1.png"].offset, bytes(512))
    repair(tmp_path, Pool(1))
    assert list(content(tmp_path, "x")) == [picture(i, kind="png") for i in range(3)]
    assert [name.split("-")[0] for name in members(tar)] == ["0.png", "salvaged", "2.png"]


def test_long_names(tmp_path):
    """They have pairs of headers, of which the second or the first is damaged."""
    for kind in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        folder = tmp_path / str(kind)
        folder.mkdir()
        with tarfile.open(folder / "x-0.tar", "w", format=kind) as archive:
            for i in range(4):
                (tmp_path / "image").write_bytes(picture(i))
                archive.add(tmp_path / "image", f"{'long' * 40}/{i}.jpg")
        index_folder(folder, Pool(1))
        found = list(members(folder / "x-0.tar").values())
        change(folder / "x-0.tar", found[0].offset_data - 512, bytes(512))
        change(folder / "x-0.tar", found[2].offset, bytes(512))
        repair(folder, Pool(1))
        assert list(content(folder, "x")) == [picture(i) for i in range(4)]
        found = list(members(folder / "x-0.tar"))
        assert found[0].startswith("salvaged")
        assert [name[-7:] for name in found[1:]] == ["g/1.jpg", "ong.jpg", "g/3.jpg"]  # the third has its short name


def test_two_images_in_a_sample(tmp_path):
    """The first one is the sample's image; another one that would precede it in the new tar is dropped."""
    pictures = {f"{i}.{kind}": picture(i, kind=kind) for i in range(3) for kind in ("png", "webp", "jpeg")}
    tar = as_tar(pictures, tmp_path / "x-0.tar")
    index_folder(tmp_path, Pool(1))
    flip(tar, members(tar)["1.png"].offset_data + 99)
    repair(tmp_path, Pool(1))
    assert list(content(tmp_path, "x")) == [picture(i, kind="png") for i in (0, 2)]
    assert list(members(tar)) == ["0.png", "0.webp", "2.png", "2.webp"]


@pytest.mark.parametrize("seed", range(25))
def test_any_damage(seed, shards):
    """Images outside the damage are kept, with their labels."""
    rng, expected = np.random.default_rng(seed), {}
    for tar in sorted(shards.glob("*.tar")):
        rows, data = np.load(index_file(tar)), bytearray(tar.read_bytes())
        harmed = np.zeros(len(data), bool)
        for _ in range(rng.integers(3)):
            start = int(rng.integers(len(data)))
            length = int(rng.choice([1, 5, 512, 3000]))
            harmed[start : start + length] = True
        if rng.random() < 0.3:
            harmed[int(rng.integers(len(data))) :] = True
        if rng.random() < 0.5:
            data = bytes(np.where(harmed, 0, np.frombuffer(data, np.uint8)).astype(np.uint8))
        else:
            data = bytes(np.frombuffer(data, np.uint8) ^ harmed * rng.integers(1, 256, len(data)).astype(np.uint8))
        before = tar.read_bytes()
        tar.write_bytes(data)
        for offset, size, _, label in rows.tolist():
            if data[offset : offset + size] == before[offset : offset + size]:
                expected[data[offset : offset + size]] = label
    repair(shards, Pool(1))
    assert content(shards) == expected
    verify(shards, Pool(1))


@pytest.mark.slow
@pytest.mark.parametrize("way", ["in place", "from the source", "new folder"])
def test_killed_at_every_moment(way, made, shards, tmp_path):
    """The folder has the old index or the new one; the next run has the same result as one that was never killed."""

    def run(folder):
        if way == "in place":
            repair(folder, Pool(1))
        else:
            prepared(made / "in", folder, *(["--repair"] if way == "from the source" else []), "--shard-size", "4")

    if way == "new folder":
        shutil.rmtree(shards)
        shards.mkdir()
    else:
        FAULTS["index flipped"](shards / "train-000000.tar")
        FAULTS["flipped"](shards / "train-000001.tar")
        FAULTS["cut"](shards / "train-000002.tar")
        FAULTS["index cut"](shards / "train-000002.tar")
    whole, folder = Path(shutil.copytree(shards, tmp_path / "whole")), tmp_path / "killed"
    run(whole)
    expected, old = files(whole), files(shards).get("index.json")
    for event in range(1, 100, 1 if way == "in place" else 2):
        shutil.copytree(shards, folder)
        if not killed(folder, event, run):
            break
        index = files(folder).get("index.json")
        assert index in (old, expected["index.json"])
        if index != old:
            shards_now = read_index(folder).splits["train"]
            assert not any(find_damage(folder, shard, digests=True) for shard in shards_now)
        if way != "new folder":
            assert (folder / "train-000003.tar").read_bytes() == expected["train-000003.tar"]
        if event % 3 == 0:  # and killed again when it is resumed
            killed(folder, event // 2, run)
        run(folder)
        assert files(folder) == expected, event
        shutil.rmtree(folder)
    assert 20 < event < 99 and files(folder) == expected


def test_hostile_members_are_neither_executed_nor_written_elsewhere(tmp_path, monkeypatch):
    """Pickles under every name that other tools load, keys outside the folder, an array of objects."""
    folder, mark = tmp_path / "deep/shards", tmp_path / "executed"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    payload = pickle.dumps(Payload(mark))
    images = {
        f"{key}.jpg": picture(i) for i, key in enumerate(("0", "../out", "../../out", f"{tmp_path}/absolute", "../x/y"))
    }
    hostile = {f"0.{kind}": payload for kind in ("pyd", "pyc", "pickle", "pkl", "pth", "__key__", "_x", "")}
    tar = as_tar(images | hostile | {"1.npy": with_object(mark), "2.jpg": picture(9)}, folder / "x-0.tar")
    index_folder(folder, Pool(1))
    flip(tar, members(tar)["2.jpg"].offset_data + 99)
    with pytest.raises(UserError, match="1 of 1 shards"):
        verify(folder, Pool(1))
    repair(folder, Pool(1))
    index_file(tar).unlink()
    flip(tar, 0)
    repair(folder, Pool(1))  # without an index: every image is decoded
    verify(folder, Pool(1))
    split, read = Split(folder, "x"), []
    for i in range(len(split)):
        data, _ = split.read(i)
        decode(data)
        read.append(data)
    assert set(read) == set(images.values()) - {picture(0)}
    assert names(tmp_path) == {"deep"} and names(tmp_path / "deep") == {"shards"}
    assert names(folder) == {"x-0.tar", "x-0.idx.npy", "index.json", "lost.txt"}
    pickle.loads(payload)
    assert mark.exists()  # the payload works where it is loaded


def test_an_index_with_files_outside_the_folder(shards, tmp_path):
    (tmp_path / "other.tar").write_bytes(b"not ours")
    index = json.loads((shards / "index.json").read_bytes())
    index["splits"]["train"][0]["file"] = "../other.tar"
    (shards / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"other\.tar"):
        repair(shards, Pool(1))
    assert (tmp_path / "other.tar").read_bytes() == b"not ours"


@pytest.mark.parametrize("size", [10**12, 10**30, -1536])
def test_a_header_with_an_absurd_size(size, tmp_path):
    """It neither allocates memory nor causes an endless loop."""
    tar = as_tar({"0.jpg": picture(0)}, tmp_path / "x-0.tar")
    index_folder(tmp_path, Pool(1))
    first = members(tar)["0.jpg"]
    with tarfile.open(tmp_path / "hostile", "w") as archive:
        member = tarfile.TarInfo("1.txt")
        member.pax_headers = {"size": str(size)}
        archive.addfile(member)
    data = tar.read_bytes()
    end = first.offset_data + -(-first.size // 512) * 512
    tar.write_bytes(data[:end] + (tmp_path / "hostile").read_bytes()[:1536] + data[:end].replace(b"0.jpg", b"2.jpg"))
    with pytest.raises(UserError, match=r"x-0\.tar"):
        read_rows(tar)
    index_file(tar).unlink()
    repair(tmp_path, Pool(1))
    assert list(content(tmp_path, "x")) == [picture(0)]
