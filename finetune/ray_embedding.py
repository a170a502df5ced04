"""Features of a split on a Ray cluster: each task computes those of some thousand consecutive images."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial

from configs.errors import UserError
from configs.schema import Data, Optim, Run
from data.folder import Folder, names_of, open_images
from data.ray_pool import cluster_resources, run_on_ray
from data.reading import Reading, reading_of
from data.shards import Split
from data.transforms import EvalTransform
from finetune.embedding import Rows, embed, embedding_loader, rows_of
from finetune.options import EmbedOptions, Size
from launch.training.precision import precision
from launch.training.world import World, init_world
from models.formats.hub import digest
from models.opening import Trained, open_encoder

PART = 4096  # images of a task: 12 MB of 768 features
MAX_WORKERS = 8  # loader processes beside a GPU


@dataclass(frozen=True)
class Job:
    """What all tasks have in common."""

    weights: str
    digest: str
    ema: bool
    size: Size | None
    source: str
    reading: Reading
    device: str
    precision: str
    batch: int
    workers: int


@dataclass(frozen=True)
class Part:
    """Consecutive images of a split; `digest` is the split's."""

    split: str
    digest: str
    samples: range


def plan_job(options: EmbedOptions) -> tuple[Job, dict[str, int]]:
    """The job of a command line, and the CPUs and GPUs of a task: one GPU if the cluster has any, else one CPU."""
    found = cluster_resources(options.ray)
    gpus = int(found.get("GPU", 0)) if options.device != "cpu" else 0
    if options.device == "cuda" and not gpus:
        raise UserError(f"--device is cuda, but the Ray cluster at {options.ray} has no GPU: use auto or cpu")
    share = min(MAX_WORKERS, max(1, int(found.get("CPU", 1)) // gpus)) if gpus else 0
    workers, device = share if options.workers is None else options.workers, "cuda" if gpus else "cpu"
    about = options.weights, digest(options.weights), options.ema, options.size, options.source, reading_of(options)
    job = Job(*about, device, options.precision, options.batch, workers)
    resources = {"cpus": max(1, workers), "gpus": min(1, gpus)}
    (kind,) = run_on_ray(_precision, [job], options.ray, **resources)
    return replace(job, precision=kind), resources


def parts_of(images: Split | Folder, batch: int) -> list[Part]:
    """The tasks of a split, in order. Parts are whole batches, so that features are those of a single process."""
    size, every = max(1, PART // batch) * batch, range(len(images))
    return [Part(images.name, images.digest, every[start : start + size]) for start in every[::size]]


def rows_on_ray(
    parts: list[Part], job: Job, address: str, resources: dict[str, int]
) -> Iterator[tuple[list[Rows], dict[int, str]]]:
    """Rows of each part, in order, and the errors of its damaged images."""
    return run_on_ray(partial(_embed_part, job=job), parts, address, **resources)


def _precision(job: Job) -> str:
    """fp32, bf16 or fp16, as a node's device has it."""
    return precision(Optim(precision=job.precision), _open(job)[1].device)


def _embed_part(part: Part, job: Job) -> tuple[list[Rows], dict[int, str]]:
    trained, world = _open(job)
    images = _images(job.source, part.split, job.reading)
    if images.digest != part.digest:
        raise UserError(f"{job.source} has other images on another node: all nodes must share it")
    transform, channels = EvalTransform.of(trained.preprocessing), trained.preprocessing.channels
    data = Data(workers=job.workers, max_pixels=job.reading.max_pixels)
    loader = embedding_loader(images, part.samples, transform, channels, data, job.batch, world)
    names, damaged = iter(names_of(images, part.samples)), {}
    parts = embed(trained, loader, world, job.precision, damaged, lambda steps, *_: steps)
    return [rows_of(batch, names, images.classes) for batch in parts], damaged


@lru_cache(1)
def _open(job: Job) -> tuple[Trained, World]:
    """The encoder and the device, once per worker process."""
    if digest(job.weights) != job.digest:
        raise UserError(f"{job.weights} is another file on another node: all nodes must share it")
    return open_encoder(job.weights, job.ema, job.size), init_world(Run(device=job.device))


@lru_cache(2)
def _images(source: str, split: str, reading: Reading) -> Split | Folder:
    return open_images(source, split, reading)
