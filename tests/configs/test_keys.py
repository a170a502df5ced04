"""Every key has a help text and may change on resume or not; sections chosen by name have their module's keys."""

from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import pytest

from configs.command import parse
from configs.errors import UserError
from configs.keys import Choice, defaults, fixed, free, free_keys, keys, section
from configs.schema import FCMAEChoice, FCMAESettings, Finetune, Pretrain
from finetune.tasks import TASKS
from pretrain.objectives import OBJECTIVES

STAGES = [(Pretrain, "objective", OBJECTIVES), (Finetune, "task", TASKS)]
SCHEMAS = [schema(**{key: module.Settings()}) for schema, key, modules in STAGES for module in modules.values()]


@dataclass(frozen=True)
class Colours(Choice):
    """Settings of an objective that does not exist."""

    bins: int = fixed(8, "bins of a histogram")
    shown: int = free(3, "pictures")


MODULES = {**OBJECTIVES, "colours": SimpleNamespace(Settings=Colours)}


def unclassified(schema: object) -> list[str]:
    return [
        key
        for key, field in keys(schema)
        if field.metadata.get("resume") not in ("fixed", "free") or not field.metadata.get("help")
    ]


@pytest.mark.parametrize("schema", SCHEMAS)
def test_every_key_is_classified_and_explained(schema):
    assert unclassified(schema) == []


def test_an_unclassified_key_is_found():
    @dataclass
    class Inner:
        good: int = fixed(1, "good")
        bare: int = 2
        dumb: int = field(default=3, metadata={"resume": "free"})

    @dataclass
    class Outer:
        inner: Inner = section(Inner, "inner")
        top: str = field(default="", metadata={"help": "top"})

    assert unclassified(Outer()) == ["inner.bare", "inner.dumb", "top"]


def test_what_may_change_on_resume():
    common = {"init", "resume", "optim.micro_batch", "optim.max_skipped", "optim.epochs"}
    common |= {f"data.{key}" for key in ("path", "workers", "cache", "cache_gb", "max_damaged", "max_pixels")}
    run = {f"run.{key}" for key in Pretrain().run.__dict__} - {"run.seed"}
    probe = {f"probe.{key}" for key in Pretrain().probe.__dict__}
    for schema in SCHEMAS:
        more = probe if isinstance(schema, Pretrain) else set()
        if isinstance(schema, Pretrain) and isinstance(schema.objective, OBJECTIVES["teacher"].Settings):
            more = probe | {"objective.teacher"}  # a digest of its weights is fixed
        assert free_keys(schema) == common | run | more


def test_a_section_chosen_by_name_has_the_keys_of_its_module(tmp_path, capsys):
    def parsed(*argv):
        return parse(Pretrain, "pretrain/digits.yaml", "", {"objective": MODULES}, list(argv))

    config = parsed("--objective.mask_ratio", ".5")
    assert isinstance(config, Pretrain) and isinstance(config.objective, FCMAESettings)
    assert (config.objective.name, config.objective.mask_ratio, config.objective.decoder_dim) == ("fcmae", 0.5, 64)
    (tmp_path / "r.yaml").write_text("objective: {name: colours, bins: 4}")
    recipe = ["--config", str(tmp_path / "r.yaml")]
    config = parsed(*recipe)
    assert isinstance(config, Pretrain) and vars(config.objective) == {"name": "colours", "bins": 4, "shown": 3}
    assert free_keys(config) - free_keys(Pretrain()) == {"objective.shown"}
    assert replace(config, init="x").objective == config.objective and parsed(*recipe) == config
    assert parsed(*recipe, "--objective.bins", "5").objective.bins == 5
    with pytest.raises(UserError, match=r"unknown key --objective\.mask_ratio"):
        parsed(*recipe, "--objective.mask_ratio", ".5")
    assert parsed(*recipe, "--objective.name", "fcmae").objective == FCMAEChoice("fcmae")  # without the recipe's keys
    assert "r.yaml: objective.bins left out" in capsys.readouterr().out
    (tmp_path / "r.yaml").write_text("objective: {name: colours, bin: 4}")
    with pytest.raises(UserError, match=r"r\.yaml: unknown key objective\.bin"):
        parsed(*recipe, "--objective.name", "fcmae")
    with pytest.raises(UserError, match=r"objective\.name is colors: .*nearest: colours"):
        parsed("--objective.name", "colors")


def test_help_shows_the_keys_of_the_chosen_module(capsys):
    with pytest.raises(SystemExit):
        parse(Pretrain, "pretrain/photos.yaml", "", {"objective": MODULES}, ["--objective.name", "colours", "--help"])
    text = capsys.readouterr().out
    assert f"--objective.name {{{','.join(MODULES)}}}" in text and "(default colours)" in text
    assert "--objective.bins N" in text and "* pictures (default 3)" in text and "mask_ratio" not in text


def test_defaults_are_those_of_the_schema_and_not_the_values_of_a_run():
    run = parse(Pretrain, "pretrain/digits.yaml", "", {"objective": MODULES}, ["--objective.name", "colours"])
    found = defaults(replace(run, objective=Colours("colours", bins=4)))
    assert (found["objective.bins"], found["objective.shown"], found["optim.name"]) == (8, 3, "adamw")
    assert found.keys() == {name for name, _ in keys(run)}
