"""The hostile inputs: a table of small makers, by kind."""

import bz2
import gzip
import json
import lzma
import os
import tarfile
import zipfile
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np

from configs.files import sha256
from tests.data.helpers import as_folder
from tests.hostile import archives
from tests.hostile.archives import EVIL_NAMES, JPEG, good, tarred, zipped
from tests.hostile.images import IMAGES, pickled_npy
from tests.hostile.trial import SECRET, Case
from tests.hostile.weights import WEIGHTS

OPTIONS = ("--no-plan", "--workers", 1)
DIRECTORY = {"size": (24, "<I"), "packed": (20, "<I"), "method": (10, "<H"), "flags": (8, "<H"), "offset": (42, "<I")}


def prepare() -> None:
    from data.prepare import prepare_and_plan

    prepare_and_plan()


def stage(name: str) -> Callable[[], None]:
    """The entry point of a module, imported in the fork."""

    def call() -> None:
        from importlib import import_module

        import_module(name).main()

    return call


def source(make: Callable[[Path], Path], *more: object) -> Callable[[Path], list]:
    return lambda base: [make(base / "in"), base / "out", *OPTIONS, *more]


def shards(change: Callable[[Path, dict], None], *action: object) -> Callable[[Path], list]:
    """Shards of a small collection, of which `change(folder, content of index.json)` damages something."""

    def make(base: Path) -> list:
        folder = _shards(base / "out")
        index = json.loads((folder / "index.json").read_text())
        text = change(folder, index)
        (folder / "index.json").write_text(text if isinstance(text, str) else json.dumps(index))
        return [folder, *(action or ("--verify",)), "--workers", 1]

    return make


def _shards(folder: Path) -> Path:
    """Two shards with a label each, and their index."""
    from data.shard_index import Index, write_index
    from data.shards import index_tar
    from data.writing import write_tar

    folder.mkdir(parents=True)
    members = [{"__key__": f"{i}", "jpg": JPEG, "cls": b"%d" % (i % 2), "json": b'{"name": "a.jpg"}'} for i in range(4)]
    found = []
    for i in range(2):
        write_tar(folder / f"train-{i:06}.tar", iter(members))
        found.append(index_tar(folder / f"train-{i:06}.tar"))
    write_index(folder, Index({"train": found}, ["cat", "dog"], {"preview": ["two"]}))
    return folder


def setting(*keys: object, value: object) -> Callable[[Path, dict], None]:
    """Set a value in index.json."""

    def change(folder: Path, index: dict) -> None:
        place = index
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value

    return change


def rows(make: Callable[[Path, np.ndarray], None]) -> Callable[[Path, dict], None]:
    """Write another .idx.npy of the first shard, which index.json vouches for."""

    def change(folder: Path, index: dict) -> None:
        file = folder / "train-000000.idx.npy"
        make(file, np.load(file))
        index["splits"]["train"][0]["index_sha256"] = sha256(file)

    return change


def _rows_with(column: str, value: int) -> Callable[[Path, dict], None]:
    def make(file: Path, found: np.ndarray) -> None:
        found[column][1] = value
        np.save(file, found)

    return rows(make)


ONE = ("splits", "train", 0)
INDEX = {
    "a trillion samples": setting(*ONE, "samples", value=10**12),
    "negative samples": setting(*ONE, "samples", value=-1),
    "more samples than rows": setting(*ONE, "samples", value=5),
    "true samples": setting(*ONE, "samples", value=True),
    "float samples": setting(*ONE, "samples", value=1e300),
    "huge bytes": setting(*ONE, "bytes", value=10**30),
    "text bytes": setting(*ONE, "bytes", value="12"),
    "file above": setting(*ONE, "file", value="../train-000000.tar"),
    "absolute file": setting(*ONE, "file", value="/etc/passwd"),
    "pipe as file": setting(*ONE, "file", value="pipe:touch evil"),
    "file with an escape": setting(*ONE, "file", value="a\x1b[2J.tar"),
    "same file twice": setting("splits", "train", 1, "file", value="train-000000.tar"),
    "no digest": setting(*ONE, "sha256", value=""),
    "numbers as classes": setting("classes", value=[1, 2, 3]),
    "no classes": setting("classes", value=[]),
    "nested classes": setting("classes", value=[["a"], {}]),
    "fewer classes than labels": setting("classes", value=["cat"]),
    "classes with escapes": setting("classes", value=["\x1b[2J\x07", "dog"]),
    "split without shards": setting("splits", "train", value={}),
    "empty split": setting("splits", "train", value=[]),
    "no split": setting("splits", value={}),
    "splits as list": setting("splits", value=[1]),
    "shard as text": setting("splits", "train", value=["train-000000.tar"]),
    "split named like a path": setting("splits", value={"../../evil": []}),
    "targets as number": setting("targets", value=5),
    "targets of unknown kind": setting("targets", value={"kind": "evil", "names": []}),
    "targets without names": setting("targets", value={"kind": "boxes"}),
    "mask without ignore": setting("targets", value={"kind": "mask", "names": ["a"]}),
    "ids of other length": setting("targets", value={"kind": "boxes", "names": ["a"], "ids": [1, 2]}),
    "names with escapes": setting("targets", value={"kind": "labels", "names": ["\x1b[2J"]}),
    "survey as text": setting("survey", value="evil"),
    "preview as number": setting("survey", value={"preview": 3}),
    "another format": setting("format", value="\x1b[2J"),
    "deep JSON": lambda folder, index: "[" * 100_000,
    "no JSON": lambda folder, index: "\0",
    "a list": lambda folder, index: "[]",
    "huge number": lambda folder, index: '{"format": ' + "9" * 10_000 + "}",
}
ROWS = {
    "objects": rows(lambda file, found: file.write_bytes(pickled_npy(file.parents[1] / "ran/evil"))),
    "other columns": rows(lambda file, found: np.save(file, np.zeros(4))),
    "header of a petabyte": rows(lambda file, found: file.write_bytes(_huge_rows(file))),
    "bytes beyond the tar": _rows_with("offset", 1 << 60),
    "size beyond the tar": _rows_with("size", (1 << 32) - 1),
    "label below": _rows_with("label", -7),
    "label above": _rows_with("label", 1 << 30),
    "nothing": rows(lambda file, found: file.write_bytes(b"")),
}


def _huge_rows(file: Path) -> bytes:
    return file.read_bytes().replace(b"'shape': (4,)", b"'shape': (999999999999999,)").ljust(1 << 12, b" ")


def _zip_field(name: str, value: int) -> Callable[[Path], Path]:
    return lambda base: _changed_zip(base, archives.in_directory(*DIRECTORY[name], value))


def _changed_zip(base: Path, change: Callable[[bytearray], None]) -> Path:
    return archives.patched(zipped(base / "x.zip", good()), change)


ZIPS = {
    "6 GB of zeros": lambda base: archives.bomb(base / "x.zip", zipfile.ZIP_DEFLATED, 6144),
    "1 GB of zeros": lambda base: archives.bomb(base / "x.zip", zipfile.ZIP_DEFLATED, 1024),
    "900 MB of bz2": lambda base: archives.bomb(base / "x.zip", zipfile.ZIP_BZIP2, 900),
    "declares 100 bytes, has 400 MB": lambda base: archives.declared_small(base / "x.zip", zipfile.ZIP_DEFLATED),
    "declares 100 bytes, has 400 MB of bz2": lambda base: archives.declared_small(base / "x.zip", zipfile.ZIP_BZIP2),
    "declares 100 bytes, has 400 MB of lzma": lambda base: archives.declared_small(base / "x.zip", zipfile.ZIP_LZMA),
    "an inner zip of 6 GB": lambda base: archives.bomb(base / "x.zip", zipfile.ZIP_DEFLATED, 6144, "inner.zip"),
    "a table of 1.1 GB": lambda base: archives.bomb(base / "x.zip", zipfile.ZIP_DEFLATED, 1100, "labels.csv"),
    "members of one name": lambda base: archives.doubled(base / "x.zip"),
    "zips in zips": lambda base: archives.nested(base / "x.zip", 5),
    "a link": lambda base: archives.linked(base / "x.zip"),
    "declares too much": _zip_field("size", 1 << 31),
    "declares less": _zip_field("size", 10),
    "packed size of 4 GB": _zip_field("packed", (1 << 32) - 2),
    "unknown method": _zip_field("method", 77),
    "encrypted": _zip_field("flags", 1),
    "offset beyond the end": _zip_field("offset", 1 << 31),
    "offset of another member": _zip_field("offset", 0),
    "a damaged header": lambda base: archives.patched(zipped(base / "x.zip", good()), archives.in_header(0, "<I", 7)),
    "a damaged directory": lambda base: archives.patched(
        zipped(base / "x.zip", good()), archives.in_directory(28, "<H", 65535)
    ),
    "a damaged label file": lambda base: _damaged_member(zipped(base / "x.zip", good({"cat/1.json": b"{}" * 50}))),
    "cut": lambda base: archives.patched(
        zipped(base / "x.zip", good()), lambda data: data.__delitem__(slice(-30, None))
    ),
}


def _damaged_member(path: Path) -> Path:
    """The content of the last member is not what its method makes."""

    def change(data: bytearray) -> None:
        start = data.rindex(b"PK\x03\x04") + 30 + len("cat/1.json")
        data[start : start + 4] = b"\xff\xff\xff\xff"

    return archives.patched(path, change)


TARS = {
    "link out": lambda base: tarred(base / "x.tar", good(), type=tarfile.SYMTYPE, linkname="../../../etc/passwd"),
    "hard link to a system file": lambda base: tarred(
        base / "x.tar", good(), type=tarfile.LNKTYPE, linkname="/etc/passwd"
    ),
    "link to itself": lambda base: tarred(base / "x.tar", good(), type=tarfile.SYMTYPE, linkname="evil.jpg"),
    "device": lambda base: tarred(base / "x.tar", good(), type=tarfile.CHRTYPE, devmajor=1, devminor=5),
    "named pipe": lambda base: tarred(base / "x.tar", good(), type=tarfile.FIFOTYPE),
    "negative size": lambda base: archives.with_header(base / "x.tar", size=-512),
    "size of an exabyte": lambda base: archives.with_header(base / "x.tar", size=1 << 60),
    "sparse": lambda base: archives.with_header(base / "x.tar", type=tarfile.GNUTYPE_SPARSE, size=1 << 40),
    "name of 250 MB": lambda base: archives.huge_name(base / "x.tar.gz", tarfile.GNUTYPE_LONGNAME),
    "attributes of 250 MB": lambda base: archives.huge_name(base / "x.tar.gz", tarfile.XHDTYPE),
    "gz of 1.5 GB": lambda base: archives.packed_zeros(base / "x.tar.gz", gzip, 1.5),
    "bz2 of 250 MB": lambda base: archives.packed_zeros(base / "x.tar.bz2", bz2, 0.25),
    "xz of 250 MB": lambda base: archives.packed_zeros(base / "x.tar.xz", lzma, 0.25),
    "cut gz": lambda base: _cut(tarred(base / "x.tar.gz", good(), "w:gz")),
    "cut": lambda base: _cut(tarred(base / "x.tar", good())),
    "gz of no tar": lambda base: _written(base / "x.tar.gz", gzip.compress(bytes(5000))),
    "random": lambda base: _written(base / "x.tar", np.random.default_rng(0).bytes(10_000)),
    "members of one name": lambda base: tarred(base / "x.tar", good(), name="cat/1.jpg", size=0),
}


def _cut(path: Path) -> Path:
    return _written(path, path.read_bytes()[: path.stat().st_size * 2 // 3])


def _written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def _labelled(name: str, data: bytes) -> Callable[[Path], list]:
    """A folder of images with a table of labels."""

    def make(base: Path) -> list:
        as_folder(good(), base / "in/photos")
        (base / "in" / name).write_bytes(data)
        return [base / "in/photos", base / "out", "--labels", base / "in" / name, *OPTIONS]

    return make


LINES = "file,label\ncat/1.jpg,{0}\ncat/2.jpg,b\ndog/1.jpg,{0}\ndog/2.jpg,b\n"
TABLES = {
    "formula": _labelled("t.csv", LINES.format("=HYPERLINK(1)").encode()),
    "path as label": _labelled("t.csv", LINES.format("../../evil").encode()),
    "escape": _labelled("t.csv", LINES.format("\x1b[2J\x07evil").encode()),
    "not UTF-8": _labelled("t.csv", LINES.encode().replace(b"{0}", b"caf\xe9")),
    "null bytes": _labelled("t.csv", LINES.encode().replace(b"{0}", b"\0")),
    "cell of 1 MB": _labelled("t.csv", LINES.format("x" * (1 << 20)).encode()),
    "no rows": _labelled("t.csv", b"file,label\n"),
    "path above": _labelled("t.csv", b"file,label\n../../../etc/passwd,a\n"),
    "deep JSON": _labelled("t.json", b"[" * 100_000),
    "huge number": _labelled("t.jsonl", b'{"file": "cat/1.jpg", "label": ' + b"9" * 10_000 + b"}\n"),
    "NaN": _labelled("t.jsonl", b'{"file": "cat/1.jpg", "label": NaN}\n'),
    "junk parquet": _labelled("t.parquet", b"PAR1" + bytes(100) + b"PAR1"),
    "UTF-16 junk": _labelled("t.csv", b"\xff\xfe" + b"\xd8\x00" * 50),
    "a folder": lambda base: [as_folder(good(), base / "in/p"), base / "out", "--labels", base / "in", *OPTIONS],
}


def _boxed(name: str, text: str) -> Callable[[Path], list]:
    def make(base: Path) -> list:
        as_folder({"1.jpg": JPEG, "2.jpg": JPEG}, base / "in/photos")
        (base / "in/boxes").mkdir()
        (base / "in/boxes" / name).write_text(text)
        (base / "in/boxes/1.txt").write_text("0 .5 .5 .2 .2\n") if name == "data.yaml" else None
        return [base / "in/photos", base / "out", "--boxes", base / "in/boxes", *OPTIONS]

    return make


LAUGHS = "".join(f'<!ENTITY a{i} "{f"&a{i - 1};" * 10 if i else "evil"}">' for i in range(12))
YAML_LAUGHS = "a: &a [x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in pairwise("abcdefghij")) + "names: *j\n"
COCO = '{{"images": [{{"id": 1, "file_name": {0}}}], "annotations": [{1}], "categories": [{{"id": 1, "name": "a"}}]}}'
ONE_BOX = '{{"id": 1, "image_id": 1, "category_id": 1, "bbox": {0}}}'
BOXES = {
    "laughs in xml": _boxed("1.xml", f"<!DOCTYPE a [{LAUGHS}]><annotation><object>&a11;</object></annotation>"),
    "file in xml": _boxed(
        "1.xml", '<!DOCTYPE a [<!ENTITY e SYSTEM "file:///etc/passwd">]><annotation><object>&e;</object></annotation>'
    ),
    "code in yaml": _boxed("data.yaml", "names: !!python/object/apply:os.mkdir [evil]\n"),
    "laughs in yaml": _boxed("data.yaml", YAML_LAUGHS),
    "NaN boxes": _boxed("x.json", COCO.format('"1.jpg"', ONE_BOX.format("[NaN, 0, 1e999, 5]"))),
    "text boxes": _boxed("x.json", COCO.format('"1.jpg"', ONE_BOX.format('"evil"'))),
    "path above": _boxed("x.json", COCO.format('"../../../etc/passwd"', ONE_BOX.format("[0, 0, 5, 5]"))),
    "numbers as names": _boxed("x.json", COCO.format("7", ONE_BOX.format("[0, 0, 5, 5]"))),
    "huge numbers": _boxed("x.json", COCO.format('"1.jpg"', ONE_BOX.format("[1e308, 1e308, 1e308, 1e308]"))),
    "deep JSON": _boxed("x.json", '{"images": ' + "[" * 100_000),
}  # fmt: skip


def _with_image(name: str, make: Callable[[], bytes]) -> Callable[[Path], list]:
    """A folder with a hostile image among good ones."""

    def words(base: Path) -> list:
        as_folder(good({f"cat/{name}": make()}), base / "in/photos")
        return [base / "in/photos", base / "out", *OPTIONS]

    return words


def _tiled(name: str, make: Callable[[], bytes]) -> Callable[[Path], list]:
    words = _with_image(name, make)
    return lambda base: [*words(base), "--tile", 16, "--keep-empty"]


def _named(name: str) -> Callable[[Path], list]:
    def words(base: Path) -> list:
        as_folder(good({name: JPEG}), base / "in/photos")
        return [base / "in/photos", base / "out", *OPTIONS]

    return words


NAMES = {
    "escape": "\x1b[2J\x1b]0;evil\x07/\x1b[31m.jpg",
    "line break": "a\nerror: evil/b\r\n.jpg",
    "right to left": "\u202eevil/\u2066gpj.jpg",
    "formula": "=1+1/@evil.jpg",
    "minus": "-rf/--labels.jpg",
    "not UTF-8": os.fsdecode(b"caf\xe9/\xff\xfe.jpg"),
    "markup": "[red]<b>/&amp;\"'.jpg",
    "quotes": "'; touch evil;'/`touch evil`$(touch evil).jpg",
    "long": "a" * 255 + "/" + "b" * 250 + ".jpg",
}


def _sparse(base: Path) -> Path:
    """An image of 100 GB that takes no disk space."""
    as_folder(good(), base / "photos")
    with (base / "photos/cat/big.jpg").open("wb") as file:
        file.write(JPEG)
        file.truncate(100 << 30)
    return base / "photos"


def _special(base: Path) -> Path:
    as_folder(good(), base / "photos")
    os.mkfifo(base / "photos/cat/pipe.jpg")
    (base / "photos/cat/loop.jpg").symlink_to("loop.jpg")
    (base / "photos/cat/above").symlink_to("../..")
    return base / "photos"


URLS = {
    "key and secret": f"s3://KEY:{SECRET}@bucket/x",
    "secret with slash": f"s3://KEY:a/{SECRET}@bucket/x",
    "token": f"https://{SECRET}@host/x",
    "password": f"https://user:{SECRET}@host/x",
    "presigned": f"https://bucket.host/x.tar?X-Amz-Signature={SECRET}",
    "account key": f"az://name:{SECRET}@account/x",
    "of google": f"gs://user:{SECRET}@bucket/x",
    "unknown protocol": f"sftp://user:{SECRET}@host/x",
    "chained": f"zip::s3://KEY:{SECRET}@bucket/x.zip",
}
PLACES = {
    "SOURCE": (prepare, lambda url: [url, "out", *OPTIONS]),
    "OUT": (prepare, lambda url: ["digits", url, *OPTIONS]),
    "--val": (prepare, lambda url: ["digits", "out", f"--val={url}", *OPTIONS]),
    "data.path": (stage("pretrain.main"), lambda url: ["--data.path", url, "--run.folder", "out"]),
    "init": (stage("finetune.main"), lambda url: [f"--init={url}"]),
    "evaluate": (stage("finetune.evaluate"), lambda url: ["best.pt", url]),
    "embed": (stage("finetune.embed"), lambda url: ["best.pt", url, "x.parquet"]),
    "plan": (stage("launch.plan"), lambda url: [url]),
}
LEAKS = [("SOURCE", name) for name in URLS] + [(place, name) for place in list(PLACES)[1:] for name in list(URLS)[::4]]


def _recipe(text: str) -> Callable[[Path], list]:
    def make(base: Path) -> list:
        (base / "in/r.yaml").write_text(text)
        return ["--config", base / "in/r.yaml", "--run.folder", base / "out"]

    return make


RECIPES = {
    "code": "run: !!python/object/apply:os.mkdir [evil]\n",
    "a secret": f"data: {{path: 's3://KEY:{SECRET}@bucket/x'}}\n",
    "name above": "run: {name: ../evil}\n",
    "absolute name": "run: {name: /evil}\n",
    "name with a folder": "run: {name: a/b}\n",
    "name with an escape": 'run: {name: "\\e[2J", nam: 1}\n',
    "text as number": "optim: {lr: evil}\n",
    "infinity": "optim: {lr: .inf}\n",
    "not a number": "optim: {lr: .nan}\n",
    "a list": "[1, 2]\n",
    "huge number": f"optim: {{epochs: {'9' * 5000}}}\n",
    "not UTF-8": "run: {name: caf\udce9}\n".encode("utf-8", "surrogateescape").decode("latin-1"),
}


def _all() -> list[Case]:
    found = [Case("index.json", name, prepare, shards(change)) for name, change in INDEX.items()]
    found += [
        Case("index.json", f"{name}, repair", prepare, shards(INDEX[name], "--repair")) for name in list(INDEX)[::5]
    ]
    found += [Case("idx.npy", name, prepare, shards(change), 2) for name, change in ROWS.items()]
    found += [Case("zip", name, prepare, source(make)) for name, make in ZIPS.items()]
    found += [Case("tar", name, prepare, source(make)) for name, make in TARS.items()]
    for name, evil in EVIL_NAMES.items():
        found.append(Case("zip name", name, prepare, source(partial(_zip_of, evil))))
        found.append(Case("tar name", name, prepare, source(partial(_tar_of, evil))))
    found += [Case("image", name, prepare, _with_image(name, make), 0) for name, make in IMAGES.items()]
    found += [Case("image", f"{name}, tiled", prepare, _tiled(name, make)) for name, make in list(IMAGES.items())[3::6]]
    found += [Case("name", name, prepare, _named(file), 0) for name, file in NAMES.items()]
    found += [
        Case("file", "100 GB", prepare, source(_sparse), 0),
        Case("file", "pipe and links", prepare, source(_special), 0),
    ]
    found += [Case("table", name, prepare, make) for name, make in TABLES.items()]
    found += [Case("boxes", name, prepare, make) for name, make in BOXES.items()]
    found += [Case("weights", name, stage("models.convert"), make) for name, make in WEIGHTS.items()]
    for place, name in LEAKS:
        main, words = PLACES[place]
        found.append(Case("secret", f"{name} in {place}", main, lambda base, w=words, url=URLS[name]: w(url), 2))
    found += [Case("recipe", name, stage("pretrain.main"), _recipe(text), 2) for name, text in RECIPES.items()]
    return found


def _zip_of(name: str, base: Path) -> Path:
    return zipped(base / "x.zip", good({name: JPEG}))


def _tar_of(name: str, base: Path) -> Path:
    return tarred(base / "x.tar", good({name: JPEG}))


CASES = _all()
