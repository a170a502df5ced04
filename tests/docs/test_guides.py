"""The guides, typed as they are written: every command runs (small) and prints what the page shows.

Without `--all`: of all pages, that every command's arguments are ones that its script takes.
"""

import json
import re
from functools import partial
from importlib.util import find_spec

import pytest
import torch

from configs.command import parse, parse_options
from configs.errors import UserError
from configs.keys import keys
from configs.schema import Encoder, FCMAESettings, Finetune, Pretrain, PretrainModel
from data import prepare
from finetune import curate, embed, evaluate, export, predict, probe
from finetune.tasks import TASKS
from launch import plan
from launch.training.memory import MEASURED_BATCHES, measure_activations
from models import convert
from models.convnext import ConvNeXt
from models.fcmae import FCMAE
from models.sizes import resolve
from pretrain import reconstruct
from pretrain.objectives import OBJECTIVES
from pretrain.objectives.fcmae import Objective
from tests.conftest import ROOT
from tests.docs.helpers import Block, Reader, blocks, check_output, give
from tests.docs.stand_in import split_words

GUIDE = ROOT / "docs/guide"
PAGES = sorted(path.stem for path in GUIDE.glob("*.md"))
HAS = {  # what the reader of a page is told to have
    "own-images": ("photos", "labelled", "new-photos"),
    "channels": ("scans", "fields", "rgb.pt"),
    "small-images": ("cifar10.tar.xz",),
    "several-labels": ("photos", "labels.csv", "new-photos", "runs/photos/fcmae.pt"),
    "one-gpu": ("shards/photos",),
    "many-nodes": ("shards/photos",),
    "detect": ("bccd",),
    "segment": ("streets", "new-photos"),
    "deploy": ("shards/photos", "new-photos", "runs/photos-finetuned/best.pt"),
    "embed": ("photos", "new-photos", "runs/photos/fcmae.pt"),
    "elsewhere": ("shards/photos", "new-photos", "runs/photos/fcmae.pt", "runs/photos-finetuned/best.pt",
                  "checkpoint-799.pth", "convnextv2_atto_1k_224_ema.pt"),
}  # fmt: skip
NEEDS = {"deploy": ("openvino", "coremltools")}  # packages that a page asks for
PARSERS = {
    "pretrain/main.py": partial(parse, Pretrain, "pretrain/digits.yaml", "", {"objective": OBJECTIVES}),
    "finetune/main.py": partial(parse, Finetune, "finetune/digits.yaml", "", {"task": TASKS}),
    "data/prepare.py": prepare.parse,
    "launch/plan.py": partial(parse_options, plan.Options, ""),
    "models/convert.py": partial(parse_options, convert.Options, ""),
    "finetune/evaluate.py": partial(parse_options, evaluate.Options, ""),
    "finetune/predict.py": partial(parse_options, predict.Options, ""),
    "finetune/export.py": partial(parse_options, export.Options, ""),
    "finetune/probe.py": partial(parse_options, probe.Options, ""),
    "finetune/embed.py": partial(parse_options, embed.EmbedOptions, ""),
    "finetune/curate.py": partial(parse_options, curate.Options, ""),
    "pretrain/reconstruct.py": partial(parse_options, reconstruct.Options, ""),
}


def follow(page: str, reader: Reader) -> None:
    """Type a page's blocks, in order, and compare what they print with what it shows."""
    output = ""
    for block in blocks(GUIDE / f"{page}.md"):
        if block.kind == "text":
            check_output(block, output)
        else:
            output = reader.type(block)


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted(HAS))
def test_commands_run_and_print_what_the_page_shows(page, tmp_path):
    for package in NEEDS.get(page, ()):
        if not find_spec(package):
            pytest.skip(f"needs {package}: pip install {package}")
    for name in HAS[page]:
        give(name, tmp_path)
    follow(page, Reader(tmp_path, do=True))


def check_arguments(reader: Reader) -> None:
    """Hand the arguments of each command that was typed to its script's own parser."""
    for program, *words in map(json.loads, reader.commands.read_text().splitlines()):
        if program in ("python", "deepspeed", "torchrun", "sbatch"):
            script, *arguments = split_words(words, ".py")[1]
            assert (ROOT / script).exists(), script
            made = f"configs/{script.split('/')[0]}/photos.yaml"  # in place of a plan that the reader would have made
            if script in PARSERS:
                PARSERS[script]([made if word.endswith("/plan.yaml") else word for word in arguments])


@pytest.mark.parametrize("page", sorted(HAS))
def test_arguments_are_ones_that_the_scripts_take(page, tmp_path, monkeypatch):
    reader = Reader(tmp_path, do=False)
    for block in blocks(GUIDE / f"{page}.md"):
        if block.kind == "python":
            compile(block.text, block.place, "exec")
        elif block.kind == "bash":
            reader.type(block)
    monkeypatch.chdir(ROOT)
    check_arguments(reader)


@pytest.mark.parametrize("page", PAGES)
def test_keys_files_and_links_that_a_page_names_exist(page):
    text = (GUIDE / f"{page}.md").read_text()
    stages = Pretrain(), *(Finetune(task=task.Settings()) for task in TASKS.values())
    valid = {key for stage in stages for key, _ in keys(stage)}
    named = set(re.findall(r"--(\w+\.\w+)", text)) | set(
        re.findall(r"`((?:data|model|objective|task|optim|augment|probe|run)\.\w+)`", text)
    )
    assert named <= valid, named - valid
    for link in re.findall(r"\]\(([^)]+)\)", text):
        assert (GUIDE / link.partition("#")[0]).exists(), link
    for file in re.findall(r"(?:configs|launch|data|models|finetune|pretrain)/[\w/.-]+\.(?:yaml|py|sh)", text):
        assert (ROOT / file).exists(), file


@pytest.mark.slow
@pytest.mark.parametrize("size", ["atto", "pico", "tiny", "base"])
def test_the_table_of_activations_is_what_a_plan_says(size):
    row = next(line for line in (GUIDE / "one-gpu.md").read_text().splitlines() if line.startswith(f"| {size} |"))
    name, modes = f"convnextv2_{size}", ("none", "mlp", "block")
    models = [FCMAE(PretrainModel(name, recompute=mode), FCMAESettings()) for mode in modes]
    models += [ConvNeXt(resolve(Encoder(name)), 1000, 0.1, mode) for mode in modes]
    objective, sums = Objective(Pretrain(objective=FCMAESettings())), []
    for model in models:
        probes = [(torch.rand(count, 3, 224, 224),) for count in MEASURED_BATCHES]
        if isinstance(model, FCMAE):
            probes = [objective.inputs(image, objective.example(len(image))) for (image,) in probes]
        sums.append(f"{measure_activations(model, probes, low=True).bytes(64) / 2**30:.1f}")
    assert sums == [cell.strip() for cell in row.split("|")[2:-1]]


def test_every_page_is_run():
    assert set(PAGES) == {*HAS, "README"} and not blocks(GUIDE / "README.md")


def test_a_key_that_does_not_exist_fails(tmp_path, monkeypatch):
    reader = Reader(tmp_path, do=False)
    reader.type(Block("page.md:3", "bash", "deepspeed --num_gpus 2 pretrain/main.py --optim.rate 1  # comment\n"))
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match="unknown key"):
        check_arguments(reader)


def test_a_block_of_an_unknown_kind_fails(tmp_path):
    with pytest.raises(AssertionError, match="nobody knows how to run fish"):
        Reader(tmp_path, do=True).type(Block("page.md:3", "fish", "ls"))


def test_a_program_that_stands_for_nothing_fails(tmp_path):
    with pytest.raises(AssertionError, match="exit code 127"):
        Reader(tmp_path, do=False).type(Block("page.md:3", "bash", "aws s3 sync shards s3://bucket\n"))


def test_output_that_is_not_there_fails():
    check_output(Block("page.md:3", "text", "loss ... images/s\n"), "epoch 1  loss 0.5  3 images/s\n")
    with pytest.raises(AssertionError, match="is not in"):
        check_output(Block("page.md:3", "text", "loss ... images/s\n"), "loss\nimages/s\n")
