"""PyTorch on the same network, batch, ranks and threads: what `bench step --against torch` measures beside ours.

On the CPU: on one rank PyTorch's eager mode; on several, DistributedDataParallel over gloo with halves on the wire,
where each MPI rank is a process of PyTorch's as well. On a GPU, of one rank: eager, the whole step as a CUDA graph, and
where it is asked for, as it takes minutes, the model compiled. Everything else that PyTorch offers for speed is on:
channels_last, the fused Adam, gradients as views into the buckets.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from distconv.benchmarks.step import CLASSES, Engine, steps_of_a_turn
from distconv.benchmarks.torch_model import translate
from distconv.comm.world import World
from distconv.data.dataset import Dataset
from distconv.data.shard import split
from distconv.errors import DistconvError, UsageError
from distconv.kernels.cpu.device import Cpu
from distconv.nn.networks import build_network

HOST = "127.0.0.1"


Rivals = Callable[[Dataset, int], list[Engine]]  # for a data set and a global batch size


@contextlib.contextmanager
def rivals(world: World, model: str, threads: int, device: str, precision: str, compiled: bool) -> Iterator[Rivals]:
    """What makes the engines; collective. device: cpu or cuda. compiled: the compiled model too.

    Raises DistconvError where there is no PyTorch for the device, UsageError for ranks that it cannot compare.
    """
    with world.together():
        try:
            torch = importlib.import_module("torch")
        except (ImportError, OSError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise DistconvError(
                f"--against torch: PyTorch cannot be imported ({reason}): pip install 'distconv[bench]'"
            ) from None
        if world.hosts > 1:
            raise UsageError(f"--against torch compares the ranks of one host, but these are on {world.hosts}")
        if device == "cuda" and world.size > 1:
            raise UsageError(f"--against torch compares one rank on a GPU, but these are {world.size}")
        if device == "cuda" and not torch.cuda.is_available():
            raise DistconvError(f"--against torch: PyTorch {torch.__version__} sees no GPU: install its CUDA build")
        if world.size > 1 and not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
            raise DistconvError(
                f"--against torch: PyTorch {torch.__version__} has no gloo, by which DDP joins ranks on the CPU: "
                "install another build, or compare one rank"
            )
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    if device == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        names = ["torch", "torch-graph", *["torch-compile"] * compiled]
        yield lambda dataset, batch_size: gpu_engines(torch, model, names, precision, dataset, batch_size)
        return
    if world.size > 1:
        join(torch, world)
    try:
        yield lambda dataset, batch_size: [
            make_engine(torch, world, model, dataset, batch_size, with_compiler)
            for with_compiler in ((False, True) if compiled else (False,))
        ]
    finally:
        if world.size > 1:
            torch.distributed.destroy_process_group()


def join(torch: Any, world: World) -> None:
    """Make the MPI ranks a process group of PyTorch's; the system chooses the port, MPI tells it to all."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    Store = importlib.import_module("torch.distributed").TCPStore
    store = Store(HOST, 0, world.size, is_master=True, wait_for_workers=False) if world.rank == 0 else None
    port = world.comm.bcast(store.port if store else None)
    if store is None:
        store = Store(HOST, port, world.size, is_master=False)
    torch.distributed.init_process_group("gloo", store=store, rank=world.rank, world_size=world.size)


def network(torch: Any, name: str, dataset: Dataset) -> Any:
    model, _ = build_network(name, dataset.image_shape, CLASSES, (CLASSES,))
    return translate(torch, model, dataset.image_shape)


def pixels(torch: Any, images: Any) -> Any:
    """Bytes (N, C, H, W) as 0 to 1."""
    return (images.float() / 255).contiguous(memory_format=torch.channels_last)


def count_correct(torch: Any, model: Any, batches: Iterable[tuple[Any, Any]]) -> int:
    """How many images of batches the model takes for what their labels say."""
    model.eval()
    with torch.inference_mode():
        correct = sum(int((model(pixels(torch, images)).argmax(1) == labels).sum()) for images, labels in batches)
    model.train()
    return correct


def gpu_engines(
    torch: Any, network_name: str, names: Sequence[str], precision: str, dataset: Dataset, batch_size: int
) -> list[Engine]:
    """PyTorch on GPU 0: torch as it is, torch-graph with its step recorded, torch-compile with its model compiled."""
    made, steps = [], steps_of_a_turn(batch_size)
    for name in names:
        model = network(torch, network_name, dataset).cuda()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.001, fused=True, capturable=name == "torch-graph")
        images = torch.from_numpy(dataset.train_images[:batch_size]).cuda().permute(0, 3, 1, 2)
        labels = torch.from_numpy(dataset.train_labels[:batch_size]).cuda().long()
        step = gpu_step(torch, model, optimizer, images, labels, name, precision)
        evaluation = functools.partial(count_correct, torch, model, [(images, labels)])
        made.append(Engine(name, "none", several(step, steps), evaluation, steps))
    return made


def gpu_step(
    torch: Any, model: Any, optimizer: Any, images: Any, labels: Any, name: str, precision: str
) -> Callable[[], float]:
    """A training step, which ends when its loss is here."""
    half = {"float16": torch.float16, "bfloat16": torch.bfloat16}.get(precision)
    forward = torch.compile(model, mode="max-autotune") if name == "torch-compile" else model

    def step() -> Any:
        optimizer.zero_grad(set_to_none=True)
        x = pixels(torch, images)
        with torch.autocast("cuda", dtype=half, enabled=half is not None):
            loss = torch.nn.functional.cross_entropy(forward(x), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    if name != "torch-graph":
        return lambda: float(step())
    aside = torch.cuda.Stream()  # as PyTorch's manual asks: some steps before, and not in the stream of old
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(aside)
    optimizer.zero_grad(set_to_none=True)  # so the graph's own memory holds the gradients, and backward need not add
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()

    def replay(kept: Any = optimizer) -> float:  # whose state the graph uses and does not own
        graph.replay()
        return float(loss)

    return replay


def several(step: Callable[[], float], steps: int) -> Callable[[], None]:
    """A turn of so many steps, each of which ends when its loss is here."""

    def turn() -> None:
        for _ in range(steps):
            step()

    return turn


def make_engine(
    torch: Any, world: World, network_name: str, dataset: Dataset, batch_size: int, with_compiler: bool
) -> Engine:
    """PyTorch, training on the data set's first images and evaluating its test images; collective."""
    model = network(torch, network_name, dataset)
    if with_compiler:
        model = torch.compile(model)
    wrapped, name, wire = model, "torch", "none"
    if world.size > 1:
        hooks = importlib.import_module("torch.distributed.algorithms.ddp_comm_hooks.default_hooks")
        wrapped = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
        wrapped.register_comm_hook(None, hooks.fp16_compress_hook)
        name, wire = "torch-ddp", "float16"
    name += "-compile" * with_compiler
    optimizer = torch.optim.Adam(model.parameters(), lr=0.001, fused=True)
    mine = split(batch_size, world.size, world.rank)
    # (N, H, W, 1) becomes (N, 1, H, W) without moving a byte, which is channels_last.
    images = torch.from_numpy(dataset.train_images[mine]).permute(0, 3, 1, 2)
    labels = torch.from_numpy(dataset.train_labels[mine]).long()
    test_images = torch.from_numpy(dataset.test_images[mine]).permute(0, 3, 1, 2).split(Cpu.evaluation_batch)
    test_labels = torch.from_numpy(dataset.test_labels[mine]).long().split(Cpu.evaluation_batch)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        scores = wrapped(pixels(torch, images))
        losses = torch.nn.functional.cross_entropy(scores, labels, reduction="sum")
        (losses * (world.size / batch_size)).backward()  # the ranks' gradients are averaged
        optimizer.step()
        return float(losses.detach())

    def evaluate() -> int:
        correct = count_correct(torch, model, zip(test_images, test_labels, strict=True))
        return int(world.comm.allreduce(correct))

    return Engine(name, wire, step, evaluate)
