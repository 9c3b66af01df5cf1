"""Every setting of a run in one frozen dataclass, which the command line, config.toml, checkpoints and logs all read.

A field's metadata is its help text and the test that a value must pass. settings.py has what gives them their values.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from distconv.command_line import nearest
from distconv.errors import UsageError
from distconv.factory import is_factory

MODELS = ("deepconvnet", "simpleconvnet", "vgg11", "vgg16", "googlenet", "resnet20", "resnet56", "resnet18")
CLASSIFY = "classify"
OPTIMIZERS = ("adam", "sgd", "momentum", "nesterov", "adagrad", "rmsprop", "lars", "lamb")
SCHEDULES = ("constant", "linear", "cosine", "one-cycle", "step", "exponential")
LR_RULES = ("none", "linear", "sqrt")
EXACT = ("int16", "int32")  # wires on which a sum does not hang on its order
WIRES = ("float16", "int8", "float32", "float64", *EXACT)
EXCHANGES = ("auto", "flat", "two-level", "buckets", "mpi", "nccl", "cuda-mpi")
DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("float32", "tf32", "float16", "bfloat16")
RESUME = ("auto", "never")
LR_BATCH = 100  # the batch size that --lr is meant for where --scale-lr is given
MOST_SHARDS = 1024  # 16 bits leave each of them 5
LONGEST_SHOWN = 200  # characters of a wrong value


def _is_unicode(text: str) -> bool:
    """Whether config.toml can hold it. Bytes of a command line that are no UTF-8 come as characters that are none."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _setting(default: Any, text: str, valid: Callable[[Any], bool] = lambda v: True, expected: str = "text") -> Any:
    return dataclasses.field(default=default, metadata={"help": text, "valid": valid, "expected": expected})


def _one_of(names: Sequence[str], default: str, text: str) -> Any:
    return _setting(default, f"{', '.join(names)}: {text}", lambda v: v in names, f"one of {', '.join(names)}")


def _at_least(least: int, default: int, text: str) -> Any:
    return _setting(default, text, lambda v: least <= v < 2**31, f"a whole number from {least} to {2**31 - 1}")


@dataclass(frozen=True)
class Config:
    """The settings of `distconv.train`; raises UsageError for a value that cannot be."""

    data: str = _setting(
        "auto",
        "mnist, cifar10, digits (built in), FILE.npz with x_train, y_train, x_test and y_test, a folder with four "
        "MNIST-named IDX files, a folder or .tar.gz in CIFAR-10's binary or python form, or package.module:function "
        "for a Dataset of your own; auto takes mnist if it is found or can be fetched, else digits",
        bool,
        "the name of a data set",
    )
    model: str = _setting(
        "deepconvnet",
        f"{', '.join(MODELS)}, or package.module:function for a network of your own",
        lambda v: v in MODELS or is_factory(v),
        f"one of {', '.join(MODELS)}, or package.module:function",
    )
    task: str = _setting(
        CLASSIFY,
        "what is learned: classify, or package.module:function for a task of your own",
        lambda v: v == CLASSIFY or is_factory(v),
        f"{CLASSIFY}, or package.module:function",
    )
    epochs: int = _at_least(1, 20, "how often the training set is visited")
    batch_size: int = _at_least(1, 100, "images in a minibatch of the whole job, shared out among the ranks")
    accumulate: int = _at_least(
        1,
        1,
        "make a step of so many times --batch-size images, whose gradients a rank computes one part after the other: a "
        "large batch in the memory of a small one",
    )
    optimizer: str = _setting(
        "adam",
        f"rule of the update: {', '.join(OPTIMIZERS)}, or package.module:function, called with --lr and the number of "
        "steps, for an optimizer of your own",
        lambda v: v in OPTIMIZERS or is_factory(v),
        f"one of {', '.join(OPTIMIZERS)}, or package.module:function",
    )
    lr: float = _setting(
        0.001, "learning rate", lambda v: math.isfinite(v) and v > 0, "a finite number above 0, 0.001 say"
    )
    schedule: str = _one_of(
        SCHEDULES,
        "constant",
        "how the learning rate goes down over the run: to 0 in a line or a half-wave; up over the first 30 % of the "
        "steps and then down to 0; to a tenth after half and again after three quarters; to a hundredth",
    )
    warmup_epochs: float = _setting(
        0.0,
        "epochs in which the learning rate rises to --lr before that",
        lambda v: 0 <= v < 2**31,
        "a number of epochs, 0 or more",
    )
    scale_lr: str = _one_of(
        LR_RULES,
        "none",
        f"multiply --lr by the batch size over {LR_BATCH}, or by its square root; a batch of k times the size makes a "
        "k-th of the steps, and takes a larger rate up to some size",
    )
    weight_decay: float = _setting(
        0.0,
        "before a step, matrices and filters are multiplied by 1 - learning rate x this; with adam, that is AdamW",
        lambda v: 0 <= v < 1e6,
        "a number from 0, 0.01 say",
    )
    clip_norm: float = _setting(
        0.0,
        "make the gradient of the whole batch shorter where its length (L2 norm) is more than this; 0: never",
        lambda v: math.isfinite(v) and v >= 0,
        "a finite number, 0 or more",
    )
    label_smoothing: float = _setting(
        0.0,
        "the share of a label that is spread over all classes, 0.1 say",
        lambda v: 0 <= v < 1,
        "a fraction from 0 to below 1",
    )
    ema: float = _setting(
        0.0,
        "keep an average of the weights, in which those of the step before count so much, 0.999 say (less in the first "
        "steps), and score and save it besides; 0: none",
        lambda v: 0 <= v < 1,
        "a fraction from 0 to below 1",
    )
    augment: str = _setting(
        "",
        "change training images at random: mnist, cifar, a list as rotate=15,shift=0.1,scale=0.1 (also crop, flip, "
        "brightness, erase), or package.module:function",
    )
    wire: str = _one_of(
        WIRES,
        "float16",
        "numbers that carry the gradients between ranks; int8, for slow links, rounds them at random to 8 bits, which "
        "changes the run; float64 computes in float64 too, to compare runs; int16 and int32 are for --shards, which "
        "takes int16 where no wire is named",
    )
    shards: int = _setting(
        0,
        "cut each minibatch into so many shards, of which a rank computes one or more, and add them up in whole "
        "numbers: then 1 to so many ranks train to the same bits, each with a gradient in memory for each shard of its "
        "own; batch norm takes its statistics shard by shard, with --wire float16, too, which rounds differently on "
        "other numbers of ranks; 0: one a rank",
        lambda v: 0 <= v <= MOST_SHARDS,
        f"a whole number from 0 to {MOST_SHARDS}",
    )
    exchange: str = _one_of(
        EXCHANGES,
        "auto",
        "how they travel: among all ranks; first within and then between hosts; among all ranks while the backward "
        "pass is still computing; to compare with, by the MPI library's own Allreduce; from GPU to GPU by NCCL, or by "
        "an MPI that is built for it",
    )
    device: str = _one_of(DEVICES, "auto", "where to compute; auto takes GPUs where every rank sees one")
    precision: str = _one_of(
        PRECISIONS,
        "float32",
        "what a GPU rounds the factors of products to, on its tensor cores but for float32; sums are in float32",
    )
    seed: int = _setting(
        0,
        "of the initial weights, the order of the samples and dropout",
        lambda v: 0 <= v < 2**32,
        "a whole number from 0 to 2^32 - 1",
    )
    limit_train: int = _at_least(0, 0, "use the first so many training images only; 0: all")
    validation: int = _at_least(
        0,
        0,
        "hold so many training images out of training, the same ones whatever the seed, the ranks and --limit-train, "
        "which takes the first of those that are left; 0: none, but for a validation set that comes with the data",
    )
    eval_samples: int = _at_least(0, 1000, "training and test images for the accuracies of each epoch; 0: all")
    ensemble: int = _at_least(
        1,
        1,
        "train so many runs at once, with --seed and the numbers after it, each by a part of the ranks, into "
        "OUT/member-0 and so on; evaluate takes them all together",
    )
    patience: int = _at_least(
        0,
        0,
        "stop after so many epochs in a row without a better score on the validation set; 0: never. The state of the "
        "epoch that was best on such a set is kept in best.safetensors",
    )
    out: str = _setting("", "folder for everything the run writes (default: runs/<time>-<model>)")
    tensorboard: bool = _setting(
        False,
        "write the run's metrics for TensorBoard, too, into OUT/tensorboard; needs tensorboardX",
        expected="true or false",
    )
    resume: str = _setting(
        "auto",
        "auto: go on from the newest good checkpoint in --out, if there is one; never: refuse a folder with a run in "
        "it; or a checkpoint file to go on from",
        bool,
        "auto, never or a checkpoint file",
    )
    init: str = _setting(
        "",
        "start a new run from the weights in a file: a checkpoint or a run's folder (of a run with --ema, the "
        "average), or a pickle or .npz of arrays; a run that goes on has its own",
    )
    checkpoint_seconds: float = _setting(
        1.0,
        "write a checkpoint when so much time has passed since the last one, or if that is more, a hundred times what "
        "the last one took (0: after every step); and at the end of each epoch",
        lambda v: v >= 0,
        "a number of seconds, 0 or more",
    )
    trace: str = _setting(
        "",
        "write where the time of each rank goes into this file, in Chrome's trace event format, for ui.perfetto.dev; "
        "the run stays the same",
    )
    trace_steps: int = _setting(
        5,
        "of how many steps --trace shows the inside, from the fourth on, as the first ones compile",
        lambda v: 1 <= v <= 1000,
        "a whole number from 1 to 1000",
    )
    hang_seconds: float = _setting(
        0.0,
        "end the job, with exit code 76 and the stacks of all ranks, where one stands still for so long; 0: for 20 "
        "times as long as any was seen to, and a minute at least (default: 0); before and after the training, one may "
        "stand still for 15 minutes",
        lambda v: v == 0 or v >= 2,
        "a number of seconds, 2 or more, or 0",
    )
    target_accuracy: float = _setting(
        0.0,
        "end with exit code 1 if the final test accuracy is below this, 0.97 say",
        lambda v: 0 <= v <= 1,
        "a fraction from 0 to 1",
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), type(field.default)
            if kind is float and type(value) is int and abs(value) < 2**53:
                value = float(value)
                object.__setattr__(self, field.name, value)
            is_text = not isinstance(value, str) or _is_unicode(value)
            if type(value) is not kind or not is_text or not field.metadata["valid"](value):
                expected = field.metadata["expected"] + ", in UTF-8" * (not is_text)
                if isinstance(value, int) and abs(value) >= 2**64:
                    value = "with a number of more than 64 bits"  # Python shows no number of thousands of digits
                shown = str(value)[:LONGEST_SHOWN]
                words = expected.replace(",", "").split() if kind is str else []  # no text is near a number
                raise UsageError(f"{flag(field.name)} {shown}: expected {expected}{nearest(shown, words)}")
        if self.wire in EXACT and not self.shards:
            raise UsageError(f"--wire {self.wire} adds up shards: say how many by --shards, 8 say, or use float16")

    @property
    def step_size(self) -> int:
        """Images of a step, of all ranks."""
        return self.batch_size * self.accumulate

    @property
    def is_exact(self) -> bool:
        """Whether shards are added up in whole numbers, so that any number of ranks has the same bits."""
        return self.wire in EXACT

    def is_out_of_patience(self, epoch: int, best: int) -> bool:
        """Whether a run is over after this epoch, as no later one than `best` had a better score; counted from 1."""
        return 0 < self.patience <= epoch - best

    def toml(self) -> str:
        """The settings as a TOML file that --config reads."""
        return "".join(f"{name} = {_toml_value(value)}\n" for name, value in dataclasses.asdict(self).items())


def _toml_value(value: Any) -> str:
    """JSON, but for what TOML writes in another way: infinity, and characters that need no escape or need one."""
    return str(value) if value == math.inf else json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def flag(name: str) -> str:
    """limit_train -> --limit-train"""
    return "--" + name.replace("_", "-")
