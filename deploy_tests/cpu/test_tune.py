"""Training that survives being killed, batch-norm recalibration, and accuracy."""

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chip_deploy.pipeline.data import DataSet, Images, PixelImages, normalise, open_data
from chip_deploy.pipeline.models import build_model
from chip_deploy.pipeline.recipe import DenseSection, TuneSection
from chip_deploy.pipeline.tune import (
    TrainingDiverged,
    TrainRecord,
    distillation_loss,
    evaluate,
    learning_rate,
    predict,
    recalibrate,
    train,
)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Where other programs share the cores, threads that wait for each other take many times as long as one alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _images(n: int, *, size: int = 8, seed: int = 0) -> PixelImages:
    draw = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (n, 3, size, size), generator=draw, dtype=torch.uint8)
    return PixelImages(pixels, torch.randint(0, 4, (n,), generator=draw))


def _data(n: int = 70, *, seed: int = 0, flip: bool = True) -> DataSet:
    return DataSet(
        name="noise",
        classes=list("abcd"),
        train=_images(n, seed=seed),
        test=_images(20, seed=seed + 100),
        has_accuracy=True,
        flip=flip,
        digest=f"noise of seed {seed}",
        size=8,
    )


def _net(*, seed: int = 0, outputs: int = 4, dropout: float = 0.0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(6, outputs),
        )


def _settings(**changes: Any) -> TuneSection:
    return TuneSection(**{"epochs": 2, "batch": 32, "lr": 0.05, **changes})


def _train(model: nn.Module, work: Path, *, data: DataSet | None = None, seed: int = 0, **changes: Any) -> TrainRecord:
    return train(model, data or _data(), _settings(**changes), seed=seed, work=work)


def _same(first: nn.Module, second: nn.Module) -> bool:
    theirs = second.state_dict()
    return all(torch.equal(value, theirs[key]) for key, value in first.state_dict().items())


# -- killed and continued ----------------------------------------------------------------------------------------------

# One interpreter imports torch once and forks a child for every run; it does no computing of its own, so that the
# children inherit no threads.
DRIVER = """
import hashlib, json, os, pathlib, signal, sys

import torch
from chip_deploy.pipeline import tune
from chip_deploy.pipeline.data import DataSet, PixelImages
from chip_deploy.pipeline.recipe import TuneSection


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def arm(moment, countdown):
    # Die at the moment's n-th coming; returns what train() is to call after every batch.
    write, replace, left = pathlib.Path.write_bytes, os.replace, [countdown]

    def due(this):
        if moment == this:
            left[0] -= 1
            return left[0] == 0
        return False

    def write_half(path, data):
        if due("half written"):
            write(path, data[: len(data) // 2])
            die()
        return write(path, data)

    def replace_or_die(source, target):
        if due("written, not renamed"):
            die()
        replace(source, target)
        if due("renamed"):
            die()

    pathlib.Path.write_bytes, os.replace = write_half, replace_or_die
    return lambda fraction, text: die() if due("batch") else None


def run(folder, after_batch, out):
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (90, 3, 16, 16), generator=draw, dtype=torch.uint8)
    images = PixelImages(pixels, torch.randint(0, 4, (90,), generator=draw))
    facts = {"name": "n", "classes": list("abcd"), "has_accuracy": True, "flip": True, "digest": "n", "size": 16}
    data = DataSet(train=images, test=images, **facts)
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Dropout2d(0.3),
        torch.nn.Conv2d(8, 16, 3), torch.nn.BatchNorm2d(16), torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Dropout(0.5), torch.nn.Linear(16, 4))
    batches = [0]

    def count(fraction, text):
        batches[0] += 1
        after_batch(fraction, text)

    settings = TuneSection(epochs=4, batch=32, lr=0.1, weight_decay=1e-3, warmup_epochs=2, label_smoothing=0.1)
    record = tune.train(model, data, settings, seed=7, work=folder, progress=count)
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode() + value.numpy().tobytes())
    result = {"weights": digest.hexdigest(), "loss": record.loss, "notes": record.notes, "batches": batches[0]}
    out.write_text(json.dumps(result))


def child(folder, kill, out):
    pid = os.fork()
    if pid == 0:
        try:
            run(folder, arm(*kill) if kill else lambda fraction, text: None, out)
        finally:
            os._exit(1 if sys.exc_info()[0] else 0)
    return os.waitpid(pid, 0)[1]


root = pathlib.Path(sys.argv[1])
results = []
for number, kills in enumerate(json.loads(sys.argv[2])):
    folder, out = root / str(number), root / f"{number}.json"
    for kill in kills:
        status = child(folder, kill, out)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (kills, status)
        assert not out.exists()
    assert child(folder, None, out) == 0, kills
    results.append(json.loads(out.read_text()))
print(json.dumps(results))
"""

KILLS: list[tuple[list[tuple[str, int]], int]] = [
    ([], 12),
    ([("batch", 2)], 12),
    ([("batch", 3)], 12),  # the epoch's last batch, before its checkpoint
    ([("batch", 7)], 6),
    ([("half written", 1)], 12),
    ([("half written", 3)], 6),
    ([("written, not renamed", 2)], 9),
    ([("renamed", 1)], 9),
    ([("renamed", 4)], 0),  # all is done but the return
    ([("batch", 5), ("batch", 2), ("half written", 2)], 6),
    ([("written, not renamed", 1), ("renamed", 2), ("batch", 4)], 3),
]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="SIGKILL and fork are POSIX")
def test_a_training_killed_at_any_moment_ends_with_the_bits_of_one_that_was_not(tmp_path: Path) -> None:
    script = tmp_path / "driver.py"
    script.write_text(DRIVER)
    asked = json.dumps([kills for kills, _ in KILLS])
    done = subprocess.run(
        [sys.executable, script, tmp_path, asked],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])

    for (kills, batches_left), result in zip(KILLS, results, strict=True):
        assert result["weights"] == results[0]["weights"], kills
        assert result["loss"] == results[0]["loss"], kills
        assert result["batches"] == batches_left, f"{kills}: continued after the last whole epoch, not from the start"
        assert result["notes"] == []


def test_a_finished_training_is_not_repeated(tmp_path: Path) -> None:
    first, again = _net(), _net()
    _train(first, tmp_path)
    told: list[str] = []
    record = train(again, _data(), _settings(), seed=0, work=tmp_path, progress=lambda _, text: told.append(text))
    assert _same(first, again)
    assert len(record.loss) == 2
    assert told == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: content[:100] + bytes([content[100] ^ 1]) + content[101:],
        lambda content: b"",
        lambda content: b"a checkpoint of something else altogether",
    ],
    ids=["cut short", "one bit", "empty", "foreign"],
)
def test_a_damaged_checkpoint_is_noted_and_training_starts_over(damage, tmp_path: Path) -> None:
    whole, repeated = _net(), _net()
    _train(whole, tmp_path)
    (checkpoint,) = tmp_path.iterdir()
    checkpoint.write_bytes(damage(checkpoint.read_bytes()))
    record = _train(repeated, tmp_path)
    assert record.notes == [f"the training checkpoint {checkpoint.name} is damaged; training started over"]
    assert _same(whole, repeated)


@pytest.mark.parametrize(
    "change",
    [
        {"epochs": 3},
        {"lr": 0.04},
        {"momentum": 0.8},
        {"weight_decay": 0.0},
        {"nesterov": False},
        {"warmup_epochs": 0},
        {"batch": 16},
        {"label_smoothing": 0.1},
        {"augment": False},
        {"max_images": 40},
        {"seed": 1},
        {"data": _data(seed=1)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_training_with_anything_else_does_not_continue_from_the_checkpoint(
    change: dict[str, Any], tmp_path: Path
) -> None:
    model, alone = _net(), _net()
    _train(_net(), tmp_path / "shared")
    _train(model, tmp_path / "shared", **change)
    _train(alone, tmp_path / "alone", **change)
    assert _same(model, alone)
    assert len([*(tmp_path / "shared").iterdir()]) == 2


def test_a_training_of_other_weights_or_with_another_teacher_does_not_continue_from_the_checkpoint(
    tmp_path: Path,
) -> None:
    for start, teacher in ((0, 5), (1, 5), (0, 6)):
        train(_net(seed=start), _data(), _settings(distill=0.5), seed=0, work=tmp_path, teacher=_net(seed=teacher))
    assert len([*tmp_path.iterdir()]) == 3


# -- what training does ------------------------------------------------------------------------------------------------


def test_training_is_sgd_on_seeded_batches_as_a_plain_loop_does_it(tmp_path: Path) -> None:
    data, settings = _data(), _settings(epochs=2, augment=False, label_smoothing=0.1)
    ours, plain = _net(), _net()
    train(ours, data, settings, seed=3, work=tmp_path)

    from chip_deploy.pipeline.batches import EpochBatches

    optimizer = torch.optim.SGD(plain.parameters(), lr=1.0, momentum=0.9, weight_decay=5e-4, nesterov=True)
    for epoch in range(2):
        for pixels, labels, _, number in EpochBatches(data.train, batch=32, seed=3, epoch=lambda: epoch):  # noqa: B023
            optimizer.param_groups[0]["lr"] = 0.05 * (number + 1) / 3 if epoch == 0 else 0.05
            optimizer.zero_grad()
            F.cross_entropy(plain(normalise(pixels)), labels, label_smoothing=0.1).backward()
            optimizer.step()

    for key, value in plain.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value, rtol=1e-5, atol=1e-6)


def test_the_learning_rate_climbs_in_the_warm_up_and_then_follows_half_a_cosine() -> None:
    settings = _settings(epochs=10, lr=0.1, warmup_epochs=2)
    rates = [
        [learning_rate(settings, epoch=epoch, batch=batch, batches=4) for batch in range(4)] for epoch in range(10)
    ]
    assert rates[0] + rates[1] == pytest.approx([0.1 * step / 8 for step in range(1, 9)])
    assert all(len({*epoch_rates}) == 1 for epoch_rates in rates[2:])
    by_hand = [0.05 * (1 + math.cos(math.pi * epoch / 8)) for epoch in range(8)]
    assert [epoch_rates[0] for epoch_rates in rates[2:]] == pytest.approx(by_hand)


@pytest.mark.parametrize(("epochs", "warmup"), [(1, 0), (1, 1), (2, 1), (3, 9)])
def test_every_epoch_of_a_short_training_has_a_learning_rate_above_zero(epochs: int, warmup: int) -> None:
    settings = _settings(epochs=epochs, lr=0.1, warmup_epochs=warmup)
    rates = [
        learning_rate(settings, epoch=epoch, batch=batch, batches=3) for epoch in range(epochs) for batch in range(3)
    ]
    assert all(0 < rate <= 0.1 for rate in rates)


def test_the_record_has_a_loss_and_a_learning_rate_for_each_epoch(tmp_path: Path) -> None:
    record = _train(_net(), tmp_path, epochs=3)
    assert (record.epochs, len(record.loss), len(record.lr)) == (3, 3, 3)
    assert record.lr == pytest.approx([0.05, 0.05, 0.025])
    assert record.seconds > 0
    assert TrainRecord.model_validate_json(record.model_dump_json()) == record


def test_training_tells_how_far_it_is_and_prints_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    told: list[tuple[float, str]] = []
    train(_net(), _data(), _settings(), seed=0, work=tmp_path, progress=lambda *args: told.append(args))
    assert [fraction for fraction, _ in told] == pytest.approx([step / 6 for step in range(1, 7)])
    assert told[0][1] == "epoch 1 of 2"
    assert told[-1][1].startswith("epoch 2 of 2, loss ")
    assert capfd.readouterr() == ("", "")


def test_training_leaves_evaluation_mode_and_the_global_generator_behind(tmp_path: Path) -> None:
    model, before = _net(dropout=0.5), torch.get_rng_state()
    _train(model, tmp_path)
    assert not any(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), before)


def test_no_epochs_change_nothing(tmp_path: Path) -> None:
    model = _net()
    record = _train(model, tmp_path / "work", epochs=0)
    assert _same(model, _net())
    assert (record.epochs, record.loss, (tmp_path / "work").exists()) == (0, [], False)


class _Watched(Images):
    """Remembers which images were read."""

    in_memory = True

    def __init__(self, images: PixelImages) -> None:
        self.images, self.labels, self.size = images, images.labels, images.size
        self.seen: list[int] = []

    def read(self, indices: Tensor) -> Tensor:
        self.seen += indices.tolist()
        return self.images.read(indices)

    def fingerprint(self) -> str:
        return self.images.fingerprint()


def test_max_images_caps_the_training_images_to_the_same_ones_in_every_epoch(tmp_path: Path) -> None:
    watched = _Watched(_images(70))
    data = DataSet(**{**vars(_data()), "train": watched})
    _train(_net(), tmp_path, data=data, max_images=30)
    assert len({*watched.seen} - {0}) in (29, 30)  # image 0 is also looked at to count the outputs
    assert len(watched.seen) == 2 * 30 + 1


def test_only_data_whose_mirrored_images_keep_their_label_is_mirrored(tmp_path: Path) -> None:
    mirrored, plain = _net(), _net()
    _train(mirrored, tmp_path, data=_data(flip=True))
    _train(plain, tmp_path / "plain", data=_data(flip=False))
    assert not _same(mirrored, plain)


def test_a_loss_that_is_no_number_ends_training_with_epoch_and_learning_rate(tmp_path: Path) -> None:
    with pytest.raises(
        TrainingDiverged, match=r"in epoch 1 of 3: the loss is (nan|inf) at a learning rate of 1e\+30"
    ) as gone:
        _train(_net(), tmp_path, epochs=3, lr=1e30, warmup_epochs=0)
    assert "Try a smaller lr" in str(gone.value)
    assert [*tmp_path.iterdir()] == []


def test_ctrl_c_interrupts_training_and_still_works_afterwards(tmp_path: Path) -> None:
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(
            _net(),
            _data(),
            _settings(),
            seed=0,
            work=tmp_path,
            progress=lambda fraction, text: signal.raise_signal(signal.SIGINT) if fraction > 0.6 else None,
        )
    assert signal.getsignal(signal.SIGINT) is handler
    model, uninterrupted = _net(), _net()
    _train(model, tmp_path)
    _train(uninterrupted, tmp_path / "other")
    assert _same(model, uninterrupted)


@pytest.mark.usefixtures("one_thread")
def test_digits_are_learnt_with_the_default_settings(tmp_path: Path) -> None:
    data = open_data("digits", size=32, seed=0)
    built = build_model("resnet18", num_classes=10, seed=0, size=32)
    train(built.module, data, DenseSection(), seed=0, work=tmp_path)
    assert evaluate(built.module, data.test).top1 >= 0.97


# -- distillation ------------------------------------------------------------------------------------------------------


def test_distillation_is_the_softened_divergence_from_the_teacher() -> None:
    draw = torch.Generator().manual_seed(0)
    scores, taught = (torch.randn(5, 7, generator=draw, dtype=torch.float64) for _ in range(2))
    by_hand = 0.0
    for ours, theirs in zip(scores.tolist(), taught.tolist(), strict=True):
        p = [math.exp(score / 3) for score in theirs]
        q = [math.exp(score / 3) for score in ours]
        by_hand += sum(a / sum(p) * math.log((a / sum(p)) / (b / sum(q))) for a, b in zip(p, q, strict=True))
    assert float(distillation_loss(scores, taught, temperature=3.0)) == pytest.approx(9 * by_hand / 5)
    assert float(distillation_loss(scores, scores, temperature=3.0)) == pytest.approx(0)


def test_a_model_distilled_alone_follows_its_teacher_whatever_the_labels_say(tmp_path: Path) -> None:
    teacher, pupil = _net(seed=1), _net(seed=2)
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    data = _data(200)
    asked = _settings(epochs=20, lr=0.2, distill=1.0, augment=False)
    start = evaluate_agreement(pupil, teacher, data.train)
    train(pupil, data, asked, seed=0, work=tmp_path, teacher=teacher)
    assert evaluate_agreement(pupil, teacher, data.train) > max(0.8, start)
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())


def evaluate_agreement(model: nn.Module, teacher: nn.Module, images: Images) -> float:
    return float((predict(model, images).argmax(1) == predict(teacher, images).argmax(1)).float().mean())


# -- settings and data that do not go together -------------------------------------------------------------------------


def test_distillation_without_a_teacher_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"distill is 0.5, but there is no model to learn from. Set distill = 0"):
        _train(_net(), tmp_path, distill=0.5)


def test_labels_beyond_the_models_outputs_are_refused(tmp_path: Path) -> None:
    sentence = r"the data has class 3 \(counted from 0\), but the model has only 3 outputs"
    with pytest.raises(ValueError, match=sentence):
        _train(_net(outputs=3), tmp_path)
    with pytest.raises(ValueError, match=sentence):
        evaluate(_net(outputs=3), _data().test)


@pytest.mark.parametrize("change", [{"batch": 1}, {"max_images": 1}])
def test_batch_norms_are_not_trained_on_single_images(change: dict[str, int], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"batch norms cannot be trained on .* give at least 2"):
        _train(_net(), tmp_path, **change)


# -- the user's own training -------------------------------------------------------------------------------------------

OWN = """
import torch

def in_place(model, train_images, test_images, settings):
    assert model.training and len(train_images) == 70 and len(test_images) == 20
    with torch.no_grad():
        model[0].weight.fill_(settings.lr)

def another(model, train_images, test_images, settings):
    import copy
    other = copy.deepcopy(model)
    torch.nn.init.constant_(other[0].weight, 0.25)
    return other

def drawn(model, train_images, test_images, settings):
    torch.nn.init.normal_(model[0].weight)

def wider(model, train_images, test_images, settings):
    return torch.nn.Conv2d(3, 12, 3)

def text(model, train_images, test_images, settings):
    return "done"
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c_own_training.py").write_text(OWN)
    monkeypatch.delitem(sys.modules, "c_own_training", raising=False)


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(("function", "value"), [("in_place", 0.05), ("another", 0.25)])
def test_a_users_function_replaces_the_training(function: str, value: float, tmp_path: Path) -> None:
    model = _net()
    record = _train(model, tmp_path, train=f"c_own_training:{function}")
    assert torch.equal(model[0].weight, torch.full_like(model[0].weight, value))
    assert torch.equal(model[-1].weight, _net()[-1].weight)
    assert not model.training
    assert record.notes == [f"trained by c_own_training:{function}"]


@pytest.mark.usefixtures("own")
def test_what_a_users_function_draws_follows_from_the_seed_alone(tmp_path: Path) -> None:
    drawn = []
    for seed, before in ((3, 0), (3, 1), (4, 0)):
        model, settings = _net(), TuneSection(epochs=1, train="c_own_training:drawn")
        torch.manual_seed(before)
        expected_after = torch.rand(3, generator=torch.Generator().manual_seed(before))
        train(model, _data(), settings, seed=seed, work=tmp_path)
        assert torch.equal(torch.rand(3), expected_after)
        drawn.append(model[0].weight.detach())
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        ("wider", "returned a model of another structure"),
        ("text", "returned a str; expected the trained model or None"),
        ("inplace", r"'inplace' is missing in c_own_training. Did you mean 'in_place'\?"),
    ],
)
def test_a_users_function_that_returns_something_else_is_refused(function: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=sentence):
        _train(_net(), tmp_path, train=f"c_own_training:{function}")


# -- batch norms -------------------------------------------------------------------------------------------------------


def _two_norms() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5))


def test_recalibration_sets_the_statistics_of_the_images_shown() -> None:
    model, images = _two_norms(), _images(30)
    recalibrate(model, images, n=30, batch=30, seed=0)

    with torch.no_grad():
        first = model[0](normalise(images.pixels))
        mean, var = first.mean((0, 2, 3)), first.var((0, 2, 3))
        scaled = (first - mean[:, None, None]) / (first.var((0, 2, 3), correction=0)[:, None, None] + 1e-5).sqrt()
        second = model[3](scaled.relu())
    assert isinstance(model[1], nn.BatchNorm2d)
    assert isinstance(model[4], nn.BatchNorm2d)
    torch.testing.assert_close(model[1].running_mean, mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model[1].running_var, var, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model[4].running_mean, second.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model[4].running_var, second.var((0, 2, 3)), rtol=1e-4, atol=1e-5)


def test_recalibration_is_a_plain_mean_over_batches_that_forgets_what_was_before() -> None:
    model, images = _two_norms(), _images(40)
    assert isinstance(model[1], nn.BatchNorm2d)
    nn.init.constant_(model[1].running_mean, 1e6)
    recalibrate(model, images, n=40, batch=10, seed=0)
    with torch.no_grad():
        mean = model[0](normalise(images.pixels)).mean((0, 2, 3))
    torch.testing.assert_close(model[1].running_mean, mean, rtol=1e-4, atol=1e-5)
    assert model[1].num_batches_tracked == 4


def test_recalibration_changes_nothing_but_the_statistics() -> None:
    model, before = _net(dropout=0.5).train(), _net(dropout=0.5)
    recalibrate(model, _images(40), n=20, batch=8, seed=0)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before.state_dict()[key])}
    assert changed == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert all(module.training for module in model.modules())
    assert isinstance(model[1], nn.BatchNorm2d)
    assert model[1].momentum == 0.1


def test_recalibration_draws_its_images_by_the_seed() -> None:
    images = _Watched(_images(40))
    seen = []
    for seed, n in ((0, 10), (0, 10), (1, 10), (0, 1000)):
        images.seen = []
        recalibrate(_net(), images, n=n, batch=8, seed=seed)
        seen.append([*images.seen])
    assert seen[0] == seen[1] != seen[2]
    assert len({*seen[0]}) == 10
    assert len({*seen[3]}) == 40


def test_recalibration_without_batch_norms_reads_no_image() -> None:
    images = _Watched(_images(4))
    recalibrate(nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), images, n=4, batch=2, seed=0)
    recalibrate(_net(), images, n=0, batch=2, seed=0)
    assert images.seen == []


def test_recalibration_on_a_single_image_is_refused() -> None:
    with pytest.raises(ValueError, match="recalibrating batch norms needs at least 2 images"):
        recalibrate(_net(), _images(1), n=1024, batch=8, seed=0)


# -- accuracy ----------------------------------------------------------------------------------------------------------


class _ReadsCorner(nn.Module):
    """Scores class k highest where the first pixel was k."""

    def forward(self, images: Tensor) -> Tensor:
        corner = ((images[:, 0, 0, 0] * 0.229 + 0.485) * 255).round().long()
        return F.one_hot(corner, 4).float()


def test_accuracy_is_the_fraction_of_right_answers() -> None:
    pixels = torch.zeros(10, 3, 8, 8, dtype=torch.uint8)
    pixels[:, 0, 0, 0] = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 0, 1])
    images = PixelImages(pixels, torch.tensor([0, 1, 2, 3, 3, 2, 1, 0, 0, 1]))
    accuracy = evaluate(_ReadsCorner(), images, batch=3)
    assert (accuracy.top1, accuracy.n) == (0.6, 10)


def test_predictions_come_in_the_order_of_the_images_whatever_the_batch() -> None:
    model, images = _net(dropout=0.5).train(), _images(11)
    together = predict(model, images, batch=11)
    assert together.shape == (11, 4)
    torch.testing.assert_close(predict(model, images, batch=2), together)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(normalise(images.pixels)), together)


def test_evaluation_leaves_modes_and_gradients_as_they_were() -> None:
    model = _net().train()
    model[1].eval()
    evaluate(model, _images(8))
    assert [module.training for module in model] == [True, False, True, True, True, True, True]
    assert torch.is_grad_enabled()
    assert _same(model, _net())


def test_evaluation_tells_how_far_it_is() -> None:
    told: list[tuple[float, str]] = []
    evaluate(_net(), _images(10), batch=5, progress=lambda *args: told.append(args))
    assert told == [(0.5, "evaluating, image 5 of 10"), (1.0, "evaluating, image 10 of 10")]


def test_no_images_have_no_accuracy() -> None:
    with pytest.raises(ValueError, match="there are no images to evaluate on"):
        evaluate(_net(), _images(0))
