"""Takes the place of python, deepspeed and other programs while bash runs the commands of a guide as they are written.

tests/docs/helpers.py puts a program of each name in PROGRAMS in front of PATH, which starts this file with its name and
its arguments. The command is noted in the file COMMANDS; with RUN=1 it is also run, made small here and nowhere else:

- training is of the recipe's model and images, but of MOST_STEPS optimizer steps with the batch SMALL;
- shards behind `s3://bucket/` are those of this folder;
- what needs several machines is read by its launcher's own parser; then `--dry-run` plans the run for all its ranks;
- tensorboard ends when it has found curves;
- trtexec compares its shapes with the input of the ONNX file.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

TRAINING = ("pretrain/main.py", "finetune/main.py", "finetune/crossval.py")
SMALL, MOST_STEPS, STEPS_KEY = ["--optim.batch_size", "8", "--optim.micro_batch", "4"], 2, "--run.max_steps"
BUCKET = "s3://bucket/"
NODES, RANKS = 4, 8  # of the clusters in the guides: machines, and GPUs of each


def become(program: str, *words: str) -> None:
    """Become a program of this environment."""
    path = sys.executable if program == "python" else str(Path(sys.executable).parent / program)
    os.execv(path, [path, *words])


def small(words: list[str]) -> list[str]:
    """The words of a script, with few steps if it trains."""
    words = [word.replace(BUCKET, "") for word in words]
    if words[0] not in TRAINING or "--dry-run" in words:
        return words
    steps = int(words[words.index(STEPS_KEY) + 1]) if STEPS_KEY in words else MOST_STEPS
    return [*words, *SMALL, STEPS_KEY, str(min(steps, MOST_STEPS))]


def plan(words: list[str], *more: str) -> None:
    """What a training script would do on all ranks of a cluster; it must be one that trains."""
    assert words[0] in TRAINING, words
    become("python", *small([*words, "--dry-run", str(NODES * RANKS), *more]))


def split_words(words: list[str], suffix: str) -> tuple[list[str], list[str]]:
    """(a launcher's options, the script and its arguments)."""
    first = next(i for i, word in enumerate(words) if word.endswith(suffix))
    return words[:first], words[first:]


def python(words: list[str]) -> None:
    become("python", *small(words))


def deepspeed(words: list[str]) -> None:
    options, script = split_words(words, ".py")
    if "--hostfile" not in options:
        become("deepspeed", "--master_port", os.environ["PORT"], *options, *small(script))
    from deepspeed.launcher import runner

    hosts = runner.fetch_hostfile(runner.parse_args(words).hostfile)
    assert list(hosts.values()) == [RANKS] * NODES, hosts
    plan(script)


def torchrun(words: list[str]) -> None:
    from torch.distributed.run import get_args_parser

    args = get_args_parser().parse_args(words)
    assert args.nnodes == str(NODES), args
    plan([args.training_script, *args.training_script_args])


def sbatch(words: list[str]) -> None:
    options, (script, *training) = split_words(words, ".sh")
    assert options == ["--nodes", str(NODES)], options
    assert f"\n#SBATCH --ntasks-per-node={RANKS}\n" in Path(script).read_text()
    subprocess.run(["bash", "-n", script], check=True)
    plan(training)


def kubectl(words: list[str]) -> None:
    import yaml

    assert words[:2] == ["apply", "-f"], words
    _, job = yaml.safe_load_all(Path(words[2]).read_text())
    container = job["spec"]["template"]["spec"]["containers"][0]
    subprocess.run(["bash", "-n", container["command"][1]], check=True)
    plan(container["args"], "--data.path", "shards/photos")


def tensorboard(words: list[str]) -> None:
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

    assert words[0] == "--logdir", words
    found = EventMultiplexer().AddRunsFromDirectory(words[1]).Reload().Runs()
    assert any("loss" in held["scalars"] for held in found.values()), found


def trtexec(words: list[str]) -> None:
    """Shapes must fit the ONNX file's input: its name, and each side that is not free."""
    import onnx

    options = dict(word.removeprefix("--").partition("=")[::2] for word in words)
    (image,) = onnx.load(options["onnx"]).graph.input
    sides = [side.dim_value for side in image.type.tensor_type.shape.dim]  # 0 = free
    assert image.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    shapes = []
    for key in ("minShapes", "optShapes", "maxShapes"):
        name, _, shape = options[key].partition(":")
        shapes.append([int(side) for side in shape.split("x")])
        assert name == image.name and len(shapes[-1]) == len(sides), (name, shape)
        assert all(fixed in (0, side) for fixed, side in zip(sides, shapes[-1], strict=True)), (shape, sides)
    assert shapes == sorted(shapes) and options["saveEngine"], words


def cat(words: list[str]) -> None:
    os.execv("/bin/cat", ["cat", *words])


PROGRAMS = {f.__name__: f for f in (python, deepspeed, torchrun, sbatch, kubectl, tensorboard, trtexec, cat)}


if __name__ == "__main__":
    name, *words = sys.argv[1:]
    with Path(os.environ["COMMANDS"]).open("a") as file:
        file.write(json.dumps([name, *words]) + "\n")
    if os.environ["RUN"] == "1":
        PROGRAMS[name](words)
