"""Weights from a hub and to one: a server on loopback, the real huggingface_hub."""

import json
import socket

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants

from configs.errors import UserError
from models.convert import main
from models.formats import hub
from models.formats.read import read_weights
from models.formats.write import to_form, write_weights
from models.opening import open_weights
from tests.conftest import QUICK, has, run
from tests.models.formats.helpers import SMALL, assert_same, classifier
from tests.models.formats.hub_server import TOKEN, Hub, Repo

WEIGHTS = classifier(**SMALL)


def use_endpoint(monkeypatch, url: str) -> None:
    """Point huggingface_hub, which reads its environment once, at a hub."""
    for place in (constants, huggingface_hub.hf_api, huggingface_hub.file_download):
        if hasattr(place, "ENDPOINT"):
            monkeypatch.setattr(place, "ENDPOINT", url)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


@pytest.fixture
def server(monkeypatch, tmp_path_factory):
    cache = str(tmp_path_factory.mktemp("cache"))
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.setattr(constants, name, cache)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the server has Git LFS only
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.localize.cache_clear()
    with Hub() as server:
        use_endpoint(monkeypatch, server.url)
        yield server
    hub.localize.cache_clear()


def folder_files(tmp_path, form: str) -> dict[str, bytes]:
    """The files of a model folder."""
    write_weights(tmp_path / form, WEIGHTS, form)
    return {file.name: file.read_bytes() for file in (tmp_path / form).iterdir()}


@pytest.mark.parametrize("form", ["transformers", "timm"])
def test_a_model_folder_is_read(form, server, tmp_path):
    repo = server.repos["me/x"] = Repo()
    first = repo.commit(folder_files(tmp_path, form) | {"pytorch_model.bin": b"not read", "README.md": b"#"})
    found, detected, remarks = read_weights("hf://me/x")
    assert detected == form and remarks == [f"commit {first[:12]}"]
    assert_same(found.encoder | found.head, WEIGHTS.encoder | WEIGHTS.head)
    assert found.preprocessing == WEIGHTS.preprocessing and found.classes == WEIGHTS.classes
    assert read_weights("hf://me/x/model.safetensors")[1] == form
    assert not any("pytorch_model" in path or "README" in path for _, path in server.requests)
    assert open_weights("hf://me/x").digest.count("-") == {"transformers": 2, "timm": 1}[form]


def test_a_revision_and_a_file(server, tmp_path):
    repo = server.repos["me/x"] = Repo()
    write_weights(tmp_path / "best.pt", WEIGHTS, "ours")
    first = repo.commit({"a b/best.pt": (tmp_path / "best.pt").read_bytes()})
    repo.commit({"a b/best.pt": b"damaged"})
    found, form, remarks = read_weights(f"hf://me/x/a b/best.pt@{first}")
    assert form == "ours" and remarks == [f"commit {first[:12]}"]
    assert_same(found.encoder, WEIGHTS.encoder)
    with pytest.raises(UserError, match="copy it again"):
        read_weights("hf://me/x/a b/best.pt")


@pytest.mark.parametrize("named", ["", "/model.safetensors.index.json"])
def test_parts(named, server, tmp_path):
    from tests.models.formats.test_containers import write_parts

    write_parts(tmp_path, to_form(WEIGHTS, "timm")[0], "safetensors", config=True)
    server.repos["me/x"] = Repo()
    server.repos["me/x"].commit({file.name: file.read_bytes() for file in tmp_path.iterdir()})
    assert_same(read_weights(f"hf://me/x{named}")[0].encoder, WEIGHTS.encoder)


def test_a_repository_of_one_file_or_of_several(server, tmp_path):
    write_weights(tmp_path / "x.pt", WEIGHTS, "ours")
    data = (tmp_path / "x.pt").read_bytes()
    for name, files in (("one", ["fcmae.pt"]), ("two", ["best.pt", "last.pt"]), ("none", ["README.md"])):
        server.repos[f"me/{name}"] = Repo()
        server.repos[f"me/{name}"].commit(dict.fromkeys(files, data))
    assert read_weights("hf://me/one")[1] == "ours"
    with pytest.raises(UserError, match=r"name one, such as hf://me/two/best\.pt"):
        read_weights("hf://me/two")
    with pytest.raises(UserError, match="no weights"):
        read_weights("hf://me/none")


def test_code_is_refused(server, tmp_path):
    """The same strict reader."""
    from tests.models.formats.test_read import Payload

    trap = tmp_path / "ran"
    torch.save({"model": Payload(trap)}, tmp_path / "x.bin")
    server.repos["me/x"] = Repo()
    server.repos["me/x"].commit({"config.json": b"{}", "pytorch_model.bin": (tmp_path / "x.bin").read_bytes()})
    with pytest.raises(UserError, match=r"code .*mkdir"):
        read_weights("hf://me/x")
    assert not trap.exists()


def closed_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"http://me:pw@127.0.0.1:{listener.getsockname()[1]}"


def test_without_a_connection(server, tmp_path, monkeypatch):
    """What is in the cache is read, with a remark; the rest is an error of one line."""
    repo = server.repos["me/x"] = Repo()
    repo.commit(folder_files(tmp_path, "transformers"))
    read_weights("hf://me/x")
    use_endpoint(monkeypatch, closed_port())
    for offline in (False, True):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        hub.localize.cache_clear()
        found, _, remarks = read_weights("hf://me/x")
        assert has(remarks[0], "commit cache 127.0.0.1 reached") and "pw" not in remarks[0]
        assert_same(found.encoder, WEIGHTS.encoder)
        for missing in ("hf://me/y", "hf://me/x/y.pt", "hf://me/x@v2") if offline else ("hf://me/y",):
            with pytest.raises(UserError, match="check the network") as error:
                read_weights(missing)
            assert "\n" not in str(error.value) and "pw" not in str(error.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("hf://me/nowhere", "no such repository"),
        ("hf://me/nowhere/x.pt", "no such repository"),
        ("hf://me/x/nowhere.pt", "no such file"),
        ("hf://me/x@v9", "no such revision"),
        ("hf://me/x/config.json@v9", "no such revision"),
        ("hf://me/gated", "gated"),
    ],
)
def test_not_found(source, message, server, tmp_path):
    server.repos |= {"me/x": Repo(), "me/gated": Repo(gated=True)}
    server.repos["me/x"].commit(folder_files(tmp_path, "timm"))
    with pytest.raises(UserError, match=message) as error:
        read_weights(source)
    assert str(error.value).startswith(source) and "\n" not in str(error.value) and TOKEN not in str(error.value)


def test_a_private_repository_needs_a_token(server, tmp_path, monkeypatch):
    repo = server.repos["me/x"] = Repo(private=True)
    repo.commit(folder_files(tmp_path, "timm"))
    assert read_weights("hf://me/x")[1] == "timm"
    hub.localize.cache_clear()
    monkeypatch.setenv("HF_TOKEN", "hf_wrongWRONGwrong")
    with pytest.raises(UserError, match="hf auth login") as error:
        read_weights("hf://me/x")
    assert "wrongWRONG" not in str(error.value)


def test_a_broken_hub(server):
    server.repos["me/x"] = Repo()
    server.broken = 418
    with pytest.raises(UserError, match="status 418"):
        read_weights("hf://me/x")


def run_convert(monkeypatch, *words) -> None:
    monkeypatch.setattr("sys.argv", ["convert.py", *map(str, words)])
    main()


@pytest.mark.parametrize("form", ["transformers", "timm"])
def test_push_and_read_back(form, server, tmp_path, monkeypatch, capsys):
    write_weights(tmp_path / "best.pt", WEIGHTS, "ours")
    words = [tmp_path / "best.pt", tmp_path / "out", "--to", form, "--push", "me/new", "--license", "mit"]
    run_convert(monkeypatch, *words)
    printed = capsys.readouterr()
    assert has(printed.out, "pushed commit") and TOKEN not in printed.out + printed.err
    repo = server.repos["me/new"]
    files = repo.commits[repo.branches["main"]]
    assert repo.private and {"README.md", "config.json", "model.safetensors"} <= files.keys()
    found = read_weights("hf://me/new")[0]
    assert_same(found.encoder | found.head, WEIGHTS.encoder | WEIGHTS.head)
    assert not any(TOKEN.encode() in file.read_bytes() for file in (tmp_path / "out").iterdir())


def test_timm_reads_what_was_pushed(server, tmp_path, monkeypatch):
    import timm

    from tests.models.formats.helpers import logits

    write_weights(tmp_path / "best.pt", WEIGHTS, "ours")
    run_convert(monkeypatch, tmp_path / "best.pt", tmp_path / "out", "--to", "timm", "--push", "me/new")
    image = torch.randn(1, 3, 64, 64)
    for name in ("hf-hub:me/new", f"local-dir:{tmp_path / 'out'}"):
        model = timm.create_model(name, pretrained=True).eval()
        with torch.no_grad():
            assert (model(image) - logits(WEIGHTS, image)).abs().max() < 1e-5
        assert tuple(model.pretrained_cfg["mean"]) == WEIGHTS.preprocessing.mean
    maps = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, features_only=True)(image)
    assert [x.shape[1] for x in maps] == list(SMALL["dims"])


@pytest.mark.parametrize(("classes", "channels", "stride"), [(0, 3, 4), (5, 1, 1), (0, 4, 4)])
def test_unusual_shapes_in_a_folder_of_timm(classes, channels, stride, tmp_path):
    """The printed lines build the model, its preprocessing included."""
    import timm

    from models.formats.write import how_to_load, how_to_load_backbone
    from tests.models.formats.helpers import maps

    weights = classifier(classes=classes, channels=channels, stem_stride=stride, **SMALL)
    assert all("omitted" not in remark for remark in write_weights(tmp_path / "x", weights, "timm"))
    model = eval(how_to_load(tmp_path / "x", weights, "timm"), {"timm": timm}).eval()
    backbone = eval(how_to_load_backbone(tmp_path / "x", weights, "timm"), {"timm": timm}).eval()
    image = torch.randn(1, channels, 64, 64)
    with torch.no_grad():
        assert model(image).shape == (1, classes or SMALL["dims"][-1])
        assert all((a - b).abs().max() < 1e-5 for a, b in zip(backbone(image), maps(weights, image), strict=True))
    data = timm.data.resolve_model_data_config(model)
    assert tuple(data["mean"]) == weights.preprocessing.mean and tuple(data["input_size"]) == (channels, 64, 64)
    assert data["crop_pct"] == 0.8 and data["interpolation"] == "bicubic"
    found = read_weights(tmp_path / "x")[0]
    assert found.arch == weights.arch and found.preprocessing == weights.preprocessing


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("shape", [{}, {"in_chans": 1, "patch_size": 1}])
def test_what_timm_writes_is_read(safe, shape, tmp_path):
    """`timm.models.push_to_hf_hub` uploads this folder."""
    import timm

    from tests.models.formats.helpers import logits

    model = timm.create_model("convnextv2_atto", num_classes=3, **shape, **SMALL).eval()
    config = {"label_names": ["x", "y", "z"]}
    timm.models._hub.save_for_hf(model, tmp_path, model_config=config, safe_serialization=safe)
    assert (tmp_path / ("model.safetensors" if safe else "pytorch_model.bin")).exists()
    found, form, _ = read_weights(tmp_path)
    image = torch.randn(1, shape.get("in_chans", 3), 64, 64)
    with torch.no_grad():
        assert (model(image) - logits(found, image)).abs().max() < 1e-5
    assert form == "timm" and found.classes == ["x", "y", "z"]
    assert found.preprocessing.interpolation == "bicubic" and found.preprocessing.size == (224, 224)


def test_older_keys_of_timm(tmp_path):
    """Without pretrained_cfg, all at the top."""
    files = folder_files(tmp_path, "transformers")
    (tmp_path / "x").mkdir()
    torch.save(to_form(WEIGHTS, "timm")[0], tmp_path / "x/pytorch_model.bin")
    config = {"architecture": "convnextv2_atto", "num_classes": 5, "input_size": [3, 96, 96], "mean": [0.5] * 3,
              "std": [0.25] * 3, "labels": list("abcde"), "interpolation": "bilinear", "crop_pct": 0.9}  # fmt: skip
    (tmp_path / "x/config.json").write_text(json.dumps(config))
    found, _, remarks = read_weights(tmp_path / "x")
    image = found.preprocessing
    assert files and remarks == [] and found.classes == list("abcde")
    assert (image.size, image.mean, image.interpolation, image.crop) == ((96, 96), (0.5,) * 3, "bilinear", 0.9)


@pytest.mark.parametrize(
    ("repo", "change", "message"),
    [
        ("you/x", {}, "status 403 hf auth login"),
        ("me/x", {"HF_TOKEN": "hf_wrongWRONGwrong"}, "hf auth login"),
        ("me/x", {"endpoint": True}, "check the network"),
    ],
)
def test_a_push_that_fails(repo, change, message, server, tmp_path, monkeypatch):
    write_weights(tmp_path / "out", WEIGHTS, "transformers")
    if change.pop("endpoint", False):
        use_endpoint(monkeypatch, closed_port())
    for name, value in change.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as error:
        hub.push(tmp_path / "out", repo)
    assert has(error.value, f"{repo} {message} hf upload") and "\n" not in str(error.value)
    assert not any(secret in str(error.value) for secret in (TOKEN, "wrongWRONG", "pw"))


@pytest.mark.slow
def test_the_commands_take_names(server, pretrained, digits, tmp_path, monkeypatch):
    """In processes of their own: convert pushes, fine-tuning starts from it, evaluate wants a folder."""
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    words = [pretrained / "fcmae.pt", tmp_path / "out", "--to", "transformers", "--push", "me/digits"]
    done = run("python3", "models/convert.py", *words)
    assert has(done.stdout, "pushed me/digits") and TOKEN not in done.stdout + done.stderr
    words = ["--init", "hf://me/digits", "--data.path", digits, "--run.folder", tmp_path, "--run.name", "x", *QUICK]
    done = run("python3", "finetune/main.py", *words, "--run.max_steps", "2")
    assert has(done.stdout, "starting hf://me/digits transformers commit")
    assert not any(TOKEN.encode() in file.read_bytes() for file in (tmp_path / "x").rglob("*") if file.is_file())
    done = run("python3", "finetune/evaluate.py", "hf://me/digits", digits, code=2)
    assert has(done.stderr, "--out") and done.stderr.count("\n") == 1
