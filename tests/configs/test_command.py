"""The command line: recipes, overrides, and one clear line for every mistake."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from pydantic import PositiveInt

from configs.command import dry_run, every_parameter, given_recipe, parse, parse_options
from configs.compare import differences, to_dict
from configs.errors import UserError, nearest
from configs.keys import REQUIRED, argument, keys, option
from configs.recipes import has_block, recipe_section
from configs.schema import Data, Encoder, Finetune, FinetuneModel, Optim, Pretrain
from finetune.tasks import TASKS
from pretrain.objectives import OBJECTIVES


@dataclass(frozen=True)
class Options:
    """Options of a command that does not exist."""

    images: tuple[str, ...] = argument("pictures")
    to: Literal["png", "jpg"] = option(REQUIRED, "format")
    out_folder: Path | None = option(None, "folder to write to")
    size: PositiveInt | tuple[PositiveInt, PositiveInt] = option(224, "side, at 100 % of the image")
    counts: tuple[PositiveInt, ...] = option((10, 20), "how many")
    fast: bool = option(False, "no checks")


CHOICES = {"objective": OBJECTIVES}


def parsed(*argv):
    return parse(Pretrain, "pretrain/digits.yaml", "about", CHOICES, list(argv))


def finetuning(*argv):
    return parse(Finetune, "finetune/digits.yaml", "about", {"task": TASKS}, list(argv))


def test_without_config_the_built_in_recipe_is_named(capsys):
    config = parsed()
    assert "no --config: using the built-in recipe" in capsys.readouterr().out
    assert config.data.path == "shards/digits" and config.model.dims == (24, 48, 96, 192)


def test_the_built_in_recipe_has_no_keys_for_another_task(tmp_path):
    config = finetuning("--task.name", "segmentation")
    assert config.task == TASKS["segmentation"].Settings("segmentation") and config.data.size == 24
    (tmp_path / "r.yaml").write_text("task: {smoothing: 0.1}\n")
    config = finetuning("--config", str(tmp_path / "r.yaml"), "--task.name", "segmentation")  # left out, with a line
    assert config.task == TASKS["segmentation"].Settings("segmentation")


def test_overrides_go_over_the_recipe_and_it_over_defaults(tmp_path):
    (tmp_path / "r.yaml").write_text("optim: {lr: 0.5, epochs: 3}\nmodel: {name: convnext_tiny}\n")
    config = parsed("--config", str(tmp_path / "r.yaml"), "--optim.epochs", "4", "--data.size=[32,64]")
    assert (config.optim.lr, config.optim.epochs, config.optim.weight_decay) == (0.5, 4, Optim().weight_decay)
    assert config.data.height_width == (32, 64)


def test_deepspeeds_local_rank_and_a_bare_resume():
    assert parsed("--local_rank=3", "--resume", "--optim.lr", "1").resume == "must"
    assert parsed("--resume", "never").resume == "never"
    assert parsed().resume == "auto"


@pytest.mark.parametrize(
    ("argv", "ranks"),
    [
        ([], None),
        (["--dry-run"], 0),
        (["--dry-run", "64"], 64),
        (["--dry-run=64"], 64),
        (["--dry-run", "--resume"], 0),
        (["--resume", "--dry-run", "8", "--optim.epochs", "3"], 8),
    ],
)
def test_dry_run(argv, ranks):
    assert dry_run(argv) == ranks and not every_parameter(argv)
    if ranks is not None:
        assert every_parameter([*argv, "--parameters"]) and dry_run([*argv, "--parameters"]) == ranks
    config = parsed(*argv)
    assert config.optim.epochs == (3 if "3" in argv else parsed().optim.epochs)
    assert config.resume == ("must" if "--resume" in argv else "auto")


@pytest.mark.parametrize("value", ["none", "0", "-3", "6.5", "runs/x"])
def test_dry_run_of_no_number_of_ranks(value):
    for argv in (["--dry-run", value], [f"--dry-run={value}"]):
        with pytest.raises(UserError, match=rf"^--dry-run is {value}: it must be a number of ranks, like 64, or alone"):
            dry_run(argv)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--dry_run", "4"], r"unknown key --dry_run \(nearest: --dry-run\)"),
        (["--model.nam", "x"], r"unknown key --model\.nam \(nearest: --model\.name\)"),
        (["--optm.lr", "1"], r"unknown key --optm\.lr \(nearest: --optim\.lr\)"),
        (["--optim.lr", "abc"], r"optim\.lr.*abc"),
        (["--optim.lr"], r"--optim\.lr: .*one argument"),
        (["--optim.lr", "--resume"], r"--optim\.lr: .*one argument"),
        (["--optim", "1"], r"unknown key --optim \("),
        (["--objective.name", "fcma"], r"objective\.name is fcma: .*\(nearest: fcmae\)"),
        (["--optim.lr", "-1"], r"optim\.lr is -1: it must be a number above 0"),
        (["--model.stem_stride", "3"], r"^model\.stem_stride is 3: it must be 1, 2 or 4$"),
        (["--objective.mask_ratio", "1"], r"objective\.mask_ratio is 1\.0: it must be above 0 and below 1"),
        (["--resume", "maybe"], "resume.*maybe"),
        (["--parameters"], r"--parameters .*--dry-run"),
        (["--optim.epochs", "1.5"], r"optim\.epochs is 1\.5: .*whole number"),
        (["--optim.epochs", "true"], r"optim\.epochs is True: .*whole number"),
        (["--optim.zero_stage", "true"], r"optim\.zero_stage is True: .*0, 1, 2 or 3"),
        (["--optim.lr", "true"], r"optim\.lr is True: .*a number"),
        (["--objective.norm_pix", "1"], r"norm_pix is 1: .*true or false"),
        (["--data.crop_scale", "[1]"], r"data\.crop_scale is \[1\]: .*2 numbers"),
        (["--data.std", "[1,x]"], r"data\.std is \[1, 'x'\]: .*a list of numbers above 0 or null"),
        (["--optim.decay_rules", "{a: b}"], r"optim\.decay_rules is .*a mapping"),
        (["--data.size", "[1"], r"data\.size is \[1: .*whole number"),
        (["--data.size", "big"], r"^data\.size is big: .* whole number above 0 or a list of 2 whole numbers above 0$"),
        (["--data.cache_gb", "0"], r"^data\.cache_gb is 0: it must be a number above 0$"),
        (["--optim.betas", "[0.9,1]"], r"^optim\.betas is \[0\.9, 1\]: .*2 numbers at least 0 and below 1$"),
        (["--run.seed", "-1"], r"^run\.seed is -1: "),
        (["--confg", "x"], r"\(nearest: --config\)"),
        (["--config"], r"--config: .*one argument"),
        (["--data.std", "[0,0,0]"], r"data\.std"),
        (["--config", "nowhere.yaml"], r"nowhere\.yaml: no such file"),
        (["stray"], "stray"),
    ],
)
def test_mistakes(argv, says):
    with pytest.raises(UserError, match=says) as error:
        parsed(*argv)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("optim: {lrr: 1}", r"r\.yaml: unknown key optim\.lrr \(nearest: optim\.lr\)"),
        ("modl: {name: x}", r"r\.yaml: unknown key modl\.name \(nearest: model\.name\)"),
        ("optim: [1", r"r\.yaml is not YAML"),
        ("optim: {lr: 1}\noptim: {lr: 2}", r"r\.yaml is not YAML: optim is written twice, in lines 1 and 2"),
        ("optim:\n  lr: 1\n  epochs: 2\n  lr: 2", r"lr is written twice, in lines 2 and 4"),
        ("optim: {lr: 1, lr: 2}", "lr is written twice"),
        ('optim: {epochs: "2"}', r'r\.yaml: optim\.epochs is the text "2", in quotes: it must be a whole number'),
        ("optim: {lr: fast}", r"r\.yaml: optim\.lr is fast: it must be a number"),
        ("just text", r"r\.yaml holds no keys"),
        ("optim:", r"r\.yaml: section optim holds no keys"),
        ("optim: 3", r"r\.yaml: section optim holds no keys"),
        ("run: {name: 010}", r"run\.name is 8: it must be text"),
        ("data: {split: off}", r"data\.split is False: it must be text"),
        ("optim: {lr: fast}", r"optim\.lr.*fast"),
    ],
)
def test_mistakes_in_a_recipe(text, says, tmp_path):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UserError, match=says):
        parsed("--config", str(tmp_path / "r.yaml"))


def test_print_config_is_a_recipe(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parsed("--optim.lr", "0.25", "--print_config")
    (tmp_path / "r.yaml").write_text(capsys.readouterr().out)
    assert parsed("--config", str(tmp_path / "r.yaml")) == parsed("--optim.lr", "0.25")


@pytest.mark.parametrize(("parse_stage", "schema", "choice", "modules"), [
    (parsed, Pretrain, "objective", OBJECTIVES), (finetuning, Finetune, "task", TASKS),
])  # fmt: skip
def test_help_explains_every_key(parse_stage, schema, choice, modules, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")  # no line is broken
    with pytest.raises(SystemExit) as stop:
        parse_stage("--help")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    lines = " ".join(text.split())
    assert "--dry-run [RANKS]" in text
    found = dict(keys(schema(**{choice: next(iter(modules.values())).Settings()})))
    assert {f"{choice}.name", "data.path", "optim.lr", "resume"} < found.keys() and len(found) > 50
    for key, field in found.items():
        assert f"--{key} " in lines and " ".join(field.metadata["help"].split()) in lines
    assert "--data.path TEXT * " in lines and "(default shards/digits)" in lines and "--data.split TEXT * " not in lines
    assert "--optim.precision {auto,fp32,bf16,fp16} " in lines and "\noptim:" in text


def test_text_is_kept_as_it_is_typed():
    config = parsed("--run.name", "010", "--data.path=1e5", "--probe.path", "off", "--data.cache", "a: b")
    assert (config.run.name, config.data.path, config.probe.path, config.data.cache) == ("010", "1e5", "off", "a: b")
    assert parsed("--probe.path", "null").probe.path is None


def test_values_of_every_kind(tmp_path):
    (tmp_path / "r.yaml").write_text(
        "optim: {lr: 1e-3, min_lr: 1E-7, weight_decay: 0, decay_rules: {stem.*: 0}, betas: [.5, 1.e-2]}\n"
        "objective: {norm_pix: off}\ndata: {path: 2020-01-01}\n"
    )
    config = parsed("--config", str(tmp_path / "r.yaml"), "--data.mean", "null", "--data.std", "[1e-1,2,.3]")
    optim, data = config.optim, config.data
    assert (optim.lr, optim.min_lr, optim.weight_decay, optim.betas) == (1e-3, 1e-7, 0, (0.5, 0.01))
    assert optim.decay_rules == {"stem.*": 0} and config.objective.norm_pix is False
    assert (data.mean, data.std, data.path) == (None, (0.1, 2.0, 0.3), "2020-01-01")
    assert parsed("--optim.decay_rules", '{"*.grn.*": 1e-2, "stem.*": 0}').optim.decay_rules["*.grn.*"] == 0.01


def test_the_last_of_equal_flags_counts():
    assert parsed("--optim.epochs", "3", "--optim.epochs=4").optim.epochs == 4


def test_one_section_of_a_recipe(tmp_path):
    (tmp_path / "r.yaml").write_text("model: {name: convnext_tiny, dims: [1, 2, 3, 4]}\noptm: {lr: 1}\n")
    model = recipe_section(tmp_path / "r.yaml", "model", Encoder)
    assert model == Encoder("convnext_tiny", dims=(1, 2, 3, 4))
    assert recipe_section(tmp_path / "r.yaml", "run", Encoder) == Encoder()
    (tmp_path / "r.yaml").write_text("model: {drop_path: x}\n")
    with pytest.raises(UserError, match=r"model\.drop_path is x: .*a number"):
        recipe_section(tmp_path / "r.yaml", "model", FinetuneModel)


BOTH = """
data: {path: shards/x, size: 64}
optim: {epochs: 3}
pretrain:
  model: {name: convnextv2_pico}
  optim: {epochs: 7}
finetune:
  layer_decay: 0.5
  task: {mixup: 0.25}
"""


def test_a_recipe_for_both_stages(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text(BOTH)
    pretrain = parse(Pretrain, "", "", {"objective": OBJECTIVES}, ["--config", str(path)])
    finetune = parse(Finetune, "", "", {"task": TASKS}, ["--config", str(path), "--task.mixup", "0.5"])
    assert (pretrain.model.name, pretrain.optim.epochs, pretrain.data.size) == ("convnextv2_pico", 7, 64)
    assert (finetune.layer_decay, finetune.optim.epochs, finetune.data.path) == (0.5, 3, "shards/x")
    assert finetune.task.mixup == 0.5 and finetune.model.name is None
    assert recipe_section(path, "model", Encoder).name == "convnextv2_pico"
    assert has_block(path, "finetune") and given_recipe("", ["--config", str(path), "--optim.lr", "1"]) == path


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("  layer_decay", "  layer_decy", r"layer_decy \(nearest: layer_decay\)"),
        ("{mixup", "{mixp", r"task\.mixp \(nearest: task\.mixup\)"),
        ("data: {path", "data: {pth", r"data\.pth \(nearest: data\.path\)"),
        ("finetune:\n", "finetune:\nlayers:\n", "block finetune holds no sections"),
    ],
)
def test_mistakes_in_a_recipe_for_both_stages(old, new, says, tmp_path):
    (tmp_path / "plan.yaml").write_text(BOTH.replace(old, new))
    with pytest.raises(UserError, match=says):
        parse(Finetune, "", "", {"task": TASKS}, ["--config", str(tmp_path / "plan.yaml")])


def test_differences():
    old, new = to_dict(parsed("--optim.lr", "1")), to_dict(parsed("--optim.lr", "2", "--run.name", "x"))
    assert differences(old, new) == ["optim.lr 1.0 -> 2.0", "run.name digits -> x"]


def test_nearest():
    assert nearest("learning", ["a", "b"]) == "(one of: a, b)"


def test_image_and_patch_sizes():
    assert Data(size=224).grid(4) == (7, 7)
    assert Data(size=(64, 96)).grid(2) == (4, 6)
    with pytest.raises(UserError, match=r"data\.size 100x100 is not a multiple of the patch, 32 pixels .* use 96x96"):
        Data(size=100).grid(4)


def test_statistics():
    assert Data().statistics(3)[0] == (0.485, 0.456, 0.406)
    assert Data().statistics(2) == ((0.5, 0.5), (0.5, 0.5))
    with pytest.raises(UserError, match=r"data\.mean is \[0\.5\]: it must be null, or 3 numbers"):
        Data(mean=(0.5,)).statistics(3)


def test_learning_rate():
    optim = Optim(lr=1e-3, batch_size=512, epochs=10, warmup_epochs=2, min_lr=1e-5)
    lrs = [optim.lr_at(step, 4) for step in range(41)]
    assert lrs[0] == 0 and lrs[4] == pytest.approx(1e-3) and lrs[8] == pytest.approx(2e-3)  # 512 / 256 x 1e-3
    assert max(lrs) == lrs[8] and lrs[8:] == sorted(lrs[8:], reverse=True)
    assert lrs[24] == pytest.approx((2e-3 + 2e-5) / 2) and lrs[40] == pytest.approx(2e-5)


def test_accumulation():
    assert Optim(batch_size=64).accumulation(2) == (32, 1)
    assert Optim(batch_size=64, micro_batch=8).accumulation(2) == (8, 4)
    for optim, ranks in ((Optim(batch_size=64, micro_batch=7), 1), (Optim(batch_size=3), 2), (Optim(batch_size=1), 2)):
        with pytest.raises(UserError, match=r"optim\.batch_size"):
            optim.accumulation(ranks)


def options(*argv):
    return parse_options(Options, "about", list(argv))


def test_options_of_a_command():
    assert options("a", "b", "--to", "png") == Options(images=("a", "b"), to="png")
    found = options(
        "--to=jpg", "--fast", "--counts", "1", "2", "--out-folder", "1e5", "--size", "[2,4]", "--", "\udce9"
    )
    assert found == Options(images=("\udce9",), to="jpg", fast=True, counts=(1, 2), out_folder=Path("1e5"), size=(2, 4))


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["a"], "required: --to"),
        (["--to", "png"], "required: IMAGES"),
        (["a", "--to", "gif"], r"^--to is gif: it must be png or jpg$"),
        (["a", "--to", "png", "--counts", "1", "0"], r"^--counts is 0: .*above 0"),
        (["a", "--to", "png", "--size", "[1]"], r"^--size is \[1\]: .*a list of 2"),
        (["a", "--to", "png", "--out_folder", "x"], r"--out_folder \(nearest: --out-folder\)"),
        (["a", "--to", "png", "--fast=1"], "--fast"),
    ],
)
def test_mistakes_in_options(argv, says):
    with pytest.raises(UserError, match=says) as error:
        options(*argv)
    assert "\n" not in str(error.value)


def test_help_explains_every_option(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        options("--help")
    lines = " ".join(capsys.readouterr().out.split())
    for shown in ("IMAGES pictures", "--to {png,jpg} format", "--out-folder PATH folder to write to --size",
                  "--size N|[N,N] side, at 100 % of the image (default 224)",
                  "--counts N [N ...] how many (default 10 20)", "--fast no checks"):  # fmt: skip
        assert shown in lines
