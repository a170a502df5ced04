"""Names of weights on a hub."""

import pytest

from configs import hub
from configs.checks import check_weights
from configs.errors import UserError
from configs.hub import HubName, check_repo, is_hub, parse_hub

TOKEN = "hf_SECRETsecretSECRET"


@pytest.mark.parametrize(
    ("source", "parsed"),
    [
        ("hf://a/b", HubName("a/b", None, None)),
        ("hf://a/b.c-d/x/y.pt@v1.0", HubName("a/b.c-d", "x/y.pt", "v1.0")),
        ("hf://a/b@refs/pr/3", HubName("a/b", None, "refs/pr/3")),
        ("hf_hub:timm/x.fcmae", HubName("timm/x.fcmae", None, None)),
        ("hf-hub:timm/x@main", HubName("timm/x", None, "main")),
    ],
)
def test_names(source, parsed):
    assert is_hub(source) and parse_hub(source) == parsed


@pytest.mark.parametrize(
    "source",
    ["hf://", "hf://a", "hf://a/b/../c", "hf://a/b//c", "hf://a/b@", "hf://a/b@main/x.pt", "hf://a/b?x=1", "hf://../b",
     f"hf://me:{TOKEN}@a/b", f"hf://{TOKEN}/b", f"hf://a/b?token={TOKEN}", "hf://a/b/x\x1b.pt", "hf_hub:a"],
)  # fmt: skip
def test_what_is_no_name(source):
    with pytest.raises(UserError, match="hf://USER/REPO") as error:
        parse_hub(source)
    assert "SECRET" not in str(error.value)


@pytest.mark.parametrize("repo", ["me", "a/b/c", "../b", "a b/c", TOKEN + "/x", "", "a/b@v1"])
def test_what_is_no_repository(repo):
    with pytest.raises(UserError, match=r"--push .*USER/REPO") as error:
        check_repo(repo, "--push")
    assert "SECRET" not in str(error.value)


def test_without_the_library(monkeypatch):
    monkeypatch.setattr(hub, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install huggingface_hub"):
        check_weights("hf://me/x")
    with pytest.raises(UserError, match="pip install huggingface_hub"):
        check_repo("me/x", "--push")
