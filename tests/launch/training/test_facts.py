"""Facts about a run: versions and commit."""

import subprocess

from launch.training.facts import commit, versions


def git(folder, *words):
    settings = ["-c", "user.name=x", "-c", "user.email=x@example.com", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", folder, *settings, *words], check=True, capture_output=True)


def test_the_commit_and_whether_files_differ(tmp_path):
    git(tmp_path, "init")
    assert commit(tmp_path) == ""  # nothing is committed
    (tmp_path / "x").write_text("1")
    git(tmp_path, "add", "x")
    git(tmp_path, "commit", "-m", "x")
    git(tmp_path, "tag", "v1")
    clean = commit(tmp_path)
    assert len(clean) == 12 and int(clean, 16) >= 0  # no tag
    (tmp_path / "x").write_text("2")
    assert commit(tmp_path) == f"{clean}-dirty"


def test_no_checkout_and_no_git(tmp_path, monkeypatch):
    assert commit(tmp_path) == ""
    monkeypatch.setenv("PATH", "")
    assert commit(tmp_path) == ""


def test_versions():
    assert {"python", "torch", "timm", "deepspeed"} <= versions().keys()
