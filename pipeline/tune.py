"""Training after the cut (and before, where a small data set has no weights), and what it is judged by."""

import contextlib
import hashlib
import io
import json
import logging
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from pydantic import BaseModel
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..chip.criterion import require_classes
from ..export.bundle import write_atomic
from .batches import Batch, EpochBatches, augment, read_ahead, shuffled, split_evenly, stream, stream_seed
from .data import DataSet, Images, Progress, normalise
from .models import import_object

# Shape letters: B images, K classes.

CHECKPOINT_FORMAT = "chip-deploy.training/1"
_DIGEST_BYTES = hashlib.sha256().digest_size
_LOSS_CHECK_BATCHES = 50  # a GPU need not wait for the loss after every batch; what diverged stays so


class TrainingDiverged(RuntimeError):
    """The loss is no longer a number."""


class TrainSettings(Protocol):
    """What a recipe's `tune` or `dense` section says.

    A section may also have `train`, which replaces the loop below by the user's own `package.module:function`. It is
    called with (model, train_images, test_images, settings): the images are data.Images (uint8, see data.normalise),
    `settings` is this section, the model is in training mode on the CPU. It trains that model in place and returns
    None, or returns a model of the same structure whose weights are then taken over. torch's own random numbers are
    seeded before it begins and put back after it. Continuing a killed run is then the function's own business.
    """

    @property
    def epochs(self) -> int: ...
    @property
    def lr(self) -> float: ...
    @property
    def momentum(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def nesterov(self) -> bool: ...
    @property
    def warmup_epochs(self) -> int: ...
    @property
    def batch(self) -> int: ...
    @property
    def label_smoothing(self) -> float: ...
    @property
    def distill(self) -> float: ...
    @property
    def temperature(self) -> float: ...
    @property
    def augment(self) -> bool: ...
    @property
    def max_images(self) -> int | None: ...


class Accuracy(BaseModel, frozen=True):
    """The fraction of n images whose highest score is their class."""

    top1: float
    n: int


class TrainRecord(BaseModel, frozen=True):
    """How a training went: the mean loss and the last learning rate of each epoch, and what happened besides."""

    epochs: int
    seconds: float
    loss: list[float]
    lr: list[float]
    notes: list[str] = []


def recalibrate(
    model: nn.Module, images: Images, *, n: int, batch: int, seed: int, progress: Progress | None = None
) -> int:
    """Set the statistics of every batch norm to their mean over n images (all, where there are fewer), seeded order.

    Nothing else changes; without batch norms nothing does. The images are shown as they are, not augmented. Returned is
    how many images were shown: 0 where nothing was set.
    Raises: ValueError for a single image, whose deviation is unknown.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.running_mean is not None]
    if not norms or n == 0:
        return 0
    chosen = shuffled(len(images), seed, "recalibrate")[:n]
    if len(chosen) < 2:
        raise ValueError(
            "recalibrating batch norms needs at least 2 images; give more, or set tune.recalibrate_images = 0."
        )
    momenta = [norm.momentum for norm in norms]
    with _on_best_device(model) as device:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # torch's word for a cumulative average
            norm.train()
        for pixels, _ in _with_progress(
            images, split_evenly(chosen, batch=batch, at_least=2), "recalibrating", progress
        ):
            model(_network_input(pixels.to(device)))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return len(chosen)


def predict(model: nn.Module, images: Images, *, batch: int = 64, progress: Progress | None = None) -> Tensor:
    """The class scores of every image, in order, in float32 without TF32.

    Shapes: -> (N, K) on the CPU.
    Raises: ValueError where there are no images.
    """
    if len(images) == 0:
        raise ValueError("there are no images to evaluate on; ask for at least one.")
    scores = []
    with _on_best_device(model) as device:
        for pixels, _ in _with_progress(
            images, split_evenly(torch.arange(len(images)), batch=batch), "evaluating", progress
        ):
            scores.append(model(_network_input(pixels.to(device))).float().cpu())
    return torch.cat(scores)


def evaluate(model: nn.Module, images: Images, *, batch: int = 64, progress: Progress | None = None) -> Accuracy:
    """Top-1 accuracy on all of the images.

    Raises: ValueError where there are no images, or the labels go beyond the model's outputs.
    """
    scores = predict(model, images, batch=batch, progress=progress)
    require_classes(images.labels, classes=scores.shape[1])
    return Accuracy(top1=int((scores.argmax(1) == images.labels).sum()) / len(images), n=len(images))


def distillation_loss(scores_BK: Tensor, taught_BK: Tensor, *, temperature: float) -> Tensor:
    """How far the softened scores are from the teacher's: T^2 KL(teacher || model), mean over the images.

    The factor T^2 keeps the gradients' size when T changes.
    Shapes: two of (B, K) -> ().
    Source (after): Hinton, Vinyals and Dean, Distilling the knowledge in a neural network, 2015.
    """
    log_taught = F.log_softmax(taught_BK / temperature, dim=1)
    log_scores = F.log_softmax(scores_BK / temperature, dim=1)
    return temperature**2 * F.kl_div(log_scores, log_taught, reduction="batchmean", log_target=True)


def learning_rate(settings: TrainSettings, *, epoch: int, batch: int, batches: int) -> float:
    """The learning rate of one batch: half a cosine over the epochs after the warm-up, which climbs batch by batch.

        lr/2 (1 + cos(pi (epoch - W) / (E - W))), times (epoch batches + batch + 1) / (W batches) while epoch < W

    E is settings.epochs, W is settings.warmup_epochs.
    Source (code): CHIP's fine-tuning script. Theirs lets the cosine run on below zero during the warm-up; ours is held
    at its top, or a warm-up of half the epochs would begin at a learning rate of 0.
    """
    warmup = min(settings.warmup_epochs, settings.epochs)
    turn = max(0, epoch - warmup) / max(1, settings.epochs - warmup)
    rate = settings.lr * (1 + float(torch.cos(torch.tensor(torch.pi * turn, dtype=torch.float64)))) / 2
    return rate * ((epoch * batches + batch + 1) / (warmup * batches)) if epoch < warmup else rate


def train(
    model: nn.Module,
    data: DataSet,
    settings: TrainSettings,
    *,
    seed: int,
    work: Path,
    teacher: nn.Module | None = None,
    progress: Progress | None = None,
) -> TrainRecord:
    """Train the model in place with SGD and leave it in evaluation mode; a killed run continues where it was.

    After every epoch the folder `work` gets a checkpoint named after the settings, the seed, the data, and the weights
    that the training started from. Called again with all of these unchanged, the training goes on after the last whole
    epoch, and on a CPU with the same number of threads ends with the same bits as one that was never interrupted.
    A damaged checkpoint is noted and training starts over. The checkpoint stays: delete `work` when the result is safe.

    With distill > 0 the loss is (1 - distill) cross-entropy + distill T^2 KL(teacher || model) at temperature T.
    Raises: TrainingDiverged naming epoch and learning rate; ValueError for settings that do not go together.
    """
    _require_sense(model, data, settings, teacher)
    if settings.epochs == 0:
        model.eval()
        return TrainRecord(epochs=0, seconds=0.0, loss=[], lr=[])
    images = _at_most(data.train, settings.max_images, seed=seed)
    own_loop = getattr(settings, "train", None)
    if own_loop is not None:
        return _train_by_user(own_loop, model, images, data.test, settings, seed=seed)
    digest = _run_digest(model, data, settings, seed=seed, teacher=teacher)
    loop = _Loop(model, images, settings, seed=seed, flip=data.flip, teacher=teacher, progress=progress)
    keeper = _Checkpoints(work / f"training-{digest[:16]}.ckpt")
    notes = keeper.resume(loop)
    if loop.done_epochs < settings.epochs:
        _fit(loop, keeper)
    model.eval()
    return TrainRecord(epochs=settings.epochs, seconds=loop.seconds, loss=loop.loss, lr=loop.lr, notes=notes)


# -- the loop ----------------------------------------------------------------------------------------------------------


class _Loop(pl.LightningModule):
    """One training: everything that a batch needs, and the record so far."""

    def __init__(
        self,
        model: nn.Module,
        images: Images,
        settings: TrainSettings,
        *,
        seed: int,
        flip: bool,
        teacher: nn.Module | None,
        progress: Progress | None,
    ) -> None:
        super().__init__()
        self.model = model
        self.settings = settings
        self.seed = seed
        self.flip = flip
        self.teacher = (teacher,)  # in a tuple: no submodule, hence neither trained nor saved
        self.report = progress
        self.batches = EpochBatches(images, batch=settings.batch, seed=seed, epoch=lambda: self.epoch)
        self.done_epochs = 0  # whole epochs before this process
        self.loss: list[float] = []
        self.lr: list[float] = []
        self.seconds = 0.0
        self.optimizer_state: dict[str, Any] | None = None
        self._loss_sum = torch.zeros(())
        self._rate = 0.0
        self._since = time.perf_counter()

    @property
    def epoch(self) -> int:
        """The epoch being trained, counted over all processes."""
        return self.done_epochs + self.current_epoch

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD, with its momenta where training is resumed."""
        settings = self.settings
        optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=settings.lr,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            nesterov=settings.nesterov and settings.momentum > 0,
        )
        if self.optimizer_state is not None:
            optimizer.load_state_dict(self.optimizer_state)
        return optimizer

    def on_fit_start(self) -> None:
        """The teacher joins the model where it is trained."""
        for teacher in self.teacher:
            if teacher is not None:
                teacher.to(self.device).eval()
        self._since = time.perf_counter()

    def on_train_epoch_start(self) -> None:
        """A new sum."""
        self._loss_sum = torch.zeros((), device=self.device)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """The batch's own learning rate, and its own dropout."""
        _, _, epoch, number = batch
        self._rate = learning_rate(self.settings, epoch=epoch, batch=number, batches=len(self.batches))
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = self._rate
        torch.manual_seed(stream_seed(self.seed, "dropout", epoch, number))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of one batch."""
        pixels, labels, epoch, number = batch
        if self.settings.augment:
            pixels = augment(pixels, flip=self.flip, generator=stream(self.seed, "augment", epoch, number))
        loss = self._batch_loss(_network_input(pixels), labels)
        self._loss_sum += loss.detach()
        if (number + 1) % _LOSS_CHECK_BATCHES == 0:
            self._require_finite(epoch)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Tell how far it is."""
        if self.report is None:
            return
        _, _, epoch, number = batch
        so_far = f", loss {self.loss[-1]:.4f}" if self.loss else ""
        fraction = (epoch + (number + 1) / len(self.batches)) / self.settings.epochs
        self.report(fraction, f"epoch {epoch + 1} of {self.settings.epochs}{so_far}")

    def end_epoch(self) -> None:
        """Add the epoch to the record."""
        self._require_finite(self.epoch)
        self.loss.append(float(self._loss_sum) / len(self.batches))
        self.lr.append(self._rate)
        now = time.perf_counter()
        self.seconds, self._since = self.seconds + now - self._since, now

    def _batch_loss(self, images: Tensor, labels: Tensor) -> Tensor:
        settings, (teacher,) = self.settings, self.teacher
        scores = self.model(images)
        loss = F.cross_entropy(scores, labels, label_smoothing=settings.label_smoothing)
        if settings.distill == 0 or teacher is None:
            return loss
        with torch.no_grad():
            taught = teacher(images)
        return (1 - settings.distill) * loss + settings.distill * distillation_loss(
            scores, taught, temperature=settings.temperature
        )

    def _require_finite(self, epoch: int) -> None:
        if not torch.isfinite(self._loss_sum):
            raise TrainingDiverged(
                f"training diverged in epoch {epoch + 1} of {self.settings.epochs}: the loss is {self._loss_sum:g} "
                f"at a learning rate of {self._rate:.3g} (lr = {self.settings.lr:g}). Try a smaller lr or more warm-up."
            )


class _Checkpoints(pl.Callback):
    """Keeps one file that holds the last whole epoch: the digest of the rest, then what torch.save wrote."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.precision_state: dict[str, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The loss scale of half precision, where training is resumed."""
        if self.precision_state:
            trainer.precision_plugin.load_state_dict(self.precision_state)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the epoch, in one step for whoever looks at the file."""
        assert isinstance(pl_module, _Loop)
        pl_module.end_epoch()
        content = io.BytesIO()
        torch.save(
            {
                "format": CHECKPOINT_FORMAT,
                "epoch": pl_module.epoch + 1,
                "model": pl_module.model.state_dict(),
                "optimizer": trainer.optimizers[0].state_dict(),
                "precision": trainer.precision_plugin.state_dict(),
                "loss": pl_module.loss,
                "lr": pl_module.lr,
                "seconds": pl_module.seconds,
            },
            content,
        )
        payload = content.getvalue()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self.path, hashlib.sha256(payload).digest() + payload)

    def resume(self, loop: _Loop) -> list[str]:
        """Put the loop where the file says, if there is one; notes for the report."""
        if not self.path.exists():
            return []
        content = self.path.read_bytes()
        payload = content[_DIGEST_BYTES:]
        if hashlib.sha256(payload).digest() != content[:_DIGEST_BYTES]:
            return [f"the training checkpoint {self.path.name} is damaged; training started over"]
        state = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
        loop.model.load_state_dict(state["model"])
        loop.done_epochs = state["epoch"]
        loop.loss, loop.lr, loop.seconds = state["loss"], state["lr"], state["seconds"]
        loop.optimizer_state = state["optimizer"]
        self.precision_state = state["precision"]
        return []


def _fit(loop: _Loop, keeper: _Checkpoints) -> None:
    """Run the epochs that are left."""
    on_gpu = torch.cuda.is_available()
    half = "bf16-mixed" if on_gpu and torch.cuda.is_bf16_supported() else "16-mixed"
    loop.model.train()
    with _quiet_lightning(), _own_random_numbers():
        trainer = pl.Trainer(
            max_epochs=loop.settings.epochs - loop.done_epochs,
            accelerator="auto",
            devices=1,
            precision=half if on_gpu else "32-true",
            logger=False,
            enable_checkpointing=False,  # Lightning's own cannot continue bit for bit from within our streams
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[keeper],
            plugins=[LightningEnvironment()],  # one process, whatever cluster this looks like
        )
        try:
            trainer.fit(loop, train_dataloaders=loop.batches)
        except SystemExit as err:  # Lightning 2.6 turns Ctrl-C into exit(1)
            if not isinstance(err.__context__, KeyboardInterrupt):
                raise
            raise KeyboardInterrupt from err
        finally:
            loop.cpu()
            for teacher in loop.teacher:
                if teacher is not None:
                    teacher.cpu()


def _own_random_numbers() -> contextlib.AbstractContextManager[None]:
    """What the block draws from torch's global generators leaves them as they were."""
    return torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_available() else [])


@contextlib.contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Lightning's remarks on hardware and progress are not ours to print."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            # Lightning 2.6 asks torch 2.15's pytree in a deprecated way
            warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _train_by_user(
    name: str, model: nn.Module, train_images: Images, test_images: Images, settings: TrainSettings, *, seed: int
) -> TrainRecord:
    function = import_object(name, what="tune.train")
    started = time.perf_counter()
    with _own_random_numbers():
        torch.manual_seed(stream_seed(seed, "tune.train"))
        returned = function(model.train(), train_images, test_images, settings)
    if returned is not None and not isinstance(returned, nn.Module):
        raise ValueError(
            f"tune.train '{name}' returned a {type(returned).__name__}; expected the trained model or None."
        )
    if returned is not None and returned is not model:
        try:
            model.load_state_dict(returned.state_dict())
        except RuntimeError as err:
            raise ValueError(
                f"tune.train '{name}' returned a model of another structure; expected the pruned one, trained."
            ) from err
    model.cpu().eval()
    seconds = time.perf_counter() - started
    return TrainRecord(epochs=settings.epochs, seconds=seconds, loss=[], lr=[], notes=[f"trained by {name}"])


# -- checks and digests ------------------------------------------------------------------------------------------------


def _require_sense(model: nn.Module, data: DataSet, settings: TrainSettings, teacher: nn.Module | None) -> None:
    if settings.epochs == 0:
        return
    if settings.distill > 0 and teacher is None:
        raise ValueError(f"distill is {settings.distill:g}, but there is no model to learn from. Set distill = 0.")
    images = min(len(data.train), settings.max_images or len(data.train))
    has_norms = any(isinstance(module, _BatchNorm) for module in model.modules())
    if has_norms and min(images, settings.batch) < 2:
        raise ValueError(
            f"batch norms cannot be trained on {images} images in batches of {settings.batch}; give at least 2."
        )
    outputs = predict(model, data.train.subset(torch.arange(1))).shape[1]
    require_classes(data.train.labels, classes=outputs)


def _at_most(images: Images, n: int | None, *, seed: int) -> Images:
    return images if n is None or n >= len(images) else images.sample(n, seed=seed, what="tune.max_images")


def _run_digest(
    model: nn.Module, data: DataSet, settings: TrainSettings, *, seed: int, teacher: nn.Module | None
) -> str:
    """Changes with everything that decides the weights which the training ends with."""
    fields = [name for name in vars(TrainSettings) if not name.startswith("_")]
    asked = {name: getattr(settings, name) for name in fields}
    known = {
        "format": CHECKPOINT_FORMAT,
        "settings": asked,
        "seed": seed,
        "data": data.digest,
        "model": _weights_digest(model),
        "teacher": _weights_digest(teacher) if teacher is not None and settings.distill > 0 else None,
    }
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def _weights_digest(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name}/{tensor.dtype}/{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


# -- running a model over images ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def _on_best_device(model: nn.Module) -> Iterator[torch.device]:
    """The model in evaluation mode on the GPU, where there is one; modes and place are as before in the end."""
    modes = {module: module.training for module in model.modules()}
    home = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    device = torch.device("cuda") if torch.cuda.is_available() else home
    exact = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
    with torch.no_grad(), exact:
        try:
            model.to(device).eval()
            yield device
        finally:
            model.to(home)
            for module, training in modes.items():
                module.training = training


def _network_input(pixels: Tensor) -> Tensor:
    """Normalised, and laid out so that convolutions need not: ResNet-56 trains and evaluates in 3/4 of the time."""
    return normalise(pixels).contiguous(memory_format=torch.channels_last)


def _with_progress(
    images: Images, batches: Sequence[Tensor], doing: str, progress: Progress | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """(pixels, labels) of each batch, told to `progress` once it has been used."""
    done, total = 0, sum(len(indices) for indices in batches)
    for indices, pixels in read_ahead(images, batches):
        yield pixels, images.labels[indices]
        done += len(indices)
        if progress is not None:
            progress(done / total, f"{doing}, image {done} of {total}")
