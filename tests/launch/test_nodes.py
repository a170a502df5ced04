"""Two emulated nodes give the losses of one, with all launchers; SLURM and Kubernetes scripts as far as possible."""

import os
import re
import subprocess
import sys

import pytest
import yaml

from launch.training.world import free_port
from tests.conftest import BIN, ROOT, losses
from tests.launch.training.helpers import SMALL

NODES = ROOT / "launch/nodes"


def words(digits, folder):
    more = ["--data.path", digits, "--run.folder", folder.parent, "--run.name", folder.name, *SMALL]
    return ["pretrain/main.py", *map(str, more), "--optim.epochs", "2"]


def together(commands: list[tuple[list[str], dict[str, str]]]) -> None:
    """Run commands in parallel with their variables; all must succeed."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
    clean["PATH"] = f"{BIN}:{clean['PATH']}"
    running = [
        subprocess.Popen(
            command, cwd=ROOT, env={**clean, **more}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for command, more in commands
    ]
    try:
        for process in running:
            output, _ = process.communicate(timeout=180)
            assert process.returncode == 0, output[-3000:]
    finally:
        for process in running:
            process.kill()
            process.wait()


def check(folder, pretrained):
    assert [loss for _, loss in losses(folder)] == pytest.approx([loss for _, loss in losses(pretrained)], rel=1e-4)


@pytest.mark.slow
def test_deepspeed_with_a_hostfile(digits, pretrained, tmp_path):
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("first slots=1\nsecond slots=1\n")
    port, script = str(free_port()), str(NODES / "deepspeed.sh")
    together([
        (["bash", script, str(hostfile), *words(digits, tmp_path / "run")],
         {"NODE_RANK": str(node), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
        for node in (0, 1)
    ])  # fmt: skip
    check(tmp_path / "run", pretrained)


@pytest.mark.slow
def test_torchrun(digits, pretrained, tmp_path):
    common = {"NODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "RANKS": "1"}
    command = ["bash", str(NODES / "torchrun.sh"), *words(digits, tmp_path / "run")]
    together([(command, {**common, "NODE_RANK": str(node)}) for node in (0, 1)])
    check(tmp_path / "run", pretrained)


def slurm_tasks(tmp_path):
    """Stand-ins for srun and scontrol: two nodes with a task each, started with the variables SLURM sets."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "scontrol").write_text(
        '#!/bin/sh\n[ "$1" = show ] && printf "127.0.0.1\\nother\\n" || echo "$@" >>"$CALLS"\n'
    )
    (tools / "srun").write_text(f"""#!{sys.executable}
import os, subprocess, sys
command = [word for word in sys.argv[1:] if not word.startswith("--kill")]
here = {{"SLURM_NTASKS": "2", "SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}}
tasks = [subprocess.Popen(command, env={{**os.environ, **here, "SLURM_PROCID": str(i)}}) for i in range(2)]
sys.exit(max([task.wait() for task in tasks]))
""")
    for tool in tools.iterdir():
        tool.chmod(0o755)
    return tools


@pytest.mark.slow
def test_slurm(digits, pretrained, tmp_path):
    tools, calls = slurm_tasks(tmp_path), tmp_path / "calls"
    env = {
        "PATH": f"{tools}:{BIN}:{os.environ['PATH']}", "CALLS": str(calls), "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": str(free_port()), "SLURM_JOB_NODELIST": "node[1-2]",
    }  # fmt: skip
    together([(["bash", str(NODES / "slurm.sh"), *words(digits, tmp_path / "run")], env)])
    check(tmp_path / "run", pretrained)
    assert not calls.exists()  # not requeued


def test_slurm_queues_a_stopped_job_again(tmp_path):
    tools, calls = slurm_tasks(tmp_path), tmp_path / "calls"
    (tools / "srun").write_text("#!/bin/sh\nexit 75\n")
    env = {
        "PATH": f"{tools}:{os.environ['PATH']}", "CALLS": str(calls), "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "x",
    }  # fmt: skip
    done = subprocess.run(
        ["bash", str(NODES / "slurm.sh"), "pretrain/main.py"], env=env, capture_output=True, text=True
    )
    assert done.returncode == 75 and calls.read_text() == "requeue 7\n"


def test_the_kubernetes_job_sets_what_torchrun_sh_needs():
    service, job = yaml.safe_load_all((NODES / "kubernetes.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    container = pod["containers"][0]
    env = {entry["name"]: entry.get("value", "from the index") for entry in container["env"]}
    script = (ROOT / container["command"][1]).read_text()
    assert set(re.findall(r"\$\{(\w+):\?", script)) == env.keys()
    assert int(env["NODES"]) == job["spec"]["completions"] == job["spec"]["parallelism"]
    assert env["MASTER_ADDR"] == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert pod["subdomain"] == service["metadata"]["name"] == service["spec"]["selector"]["job-name"]
    assert (ROOT / container["args"][0]).exists() and (ROOT / container["args"][2]).exists()
