"""User info and queries of URLs: found, hidden, refused."""

import pytest

from configs.errors import UserError, check_arguments, printable, reason, run_main
from configs.recipes import load_recipe
from configs.secrets import has_secret, without_secrets

SECRETS = [
    "s3://KEY:hush@bucket/x", "s3://KEY:a/hush@bucket/x", "s3://hush@bucket/x", "gs://:hush@b", "az://c:hush@account/x",
    "https://u:hush@h/x", "https://h/x?X-Amz-Signature=hush&a=b", "ftp://u:hush@h", "see 's3://K:hush@b/x?hush' there",
]  # fmt: skip
PLAIN = ["hf://datasets/u/r@main/x", "az://container@account/x", "http://h:8080/a@b", "ray://h:1", "a?b", "u@h:x", ""]


@pytest.mark.parametrize("text", SECRETS)
def test_secrets_are_hidden_everywhere(text):
    assert has_secret(text)
    for shown in (without_secrets(text), printable(text), reason(ValueError(text))):
        assert "hush" not in shown and "://" in shown
    with pytest.raises(UserError, match="user info or a query") as error:
        check_arguments(["--data.path=x", text])
    assert "hush" not in str(error.value)


@pytest.mark.parametrize("text", PLAIN)
def test_other_text_stays(text):
    assert not has_secret(text) and printable(text) == text
    check_arguments([text])


def test_a_recipe_with_a_secret_is_refused(tmp_path):
    (tmp_path / "r.yaml").write_text("data: {path: 's3://KEY:hush@b/x'}\n")
    with pytest.raises(UserError, match=r"data\.path") as error:
        load_recipe(tmp_path / "r.yaml", "pretrain")
    assert "hush" not in str(error.value)


def test_tracebacks_show_no_secret(capsys, monkeypatch):
    import sys

    def fail():
        raise KeyError("https://h/x?hush=1 \x1b[2J")

    monkeypatch.setattr("sys.argv", ["x"])
    monkeypatch.setattr("sys.excepthook", sys.excepthook)
    with pytest.raises(KeyError) as error:
        run_main(fail)
    sys.excepthook(error.type, error.value, error.tb)
    shown = capsys.readouterr().err
    assert "Traceback" in shown and "hush=1" not in shown.splitlines()[-1] and "\x1b" not in shown


def test_memory_that_runs_out_is_one_line(refused):
    def fail():
        raise MemoryError("Unable to allocate 7 TiB")

    assert "7 TiB" in refused(fail)
