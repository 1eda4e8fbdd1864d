"""What every test run shares: repeatable property tests, a cache of its own, and terminals 80 columns wide."""

import os
import signal
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("house", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("house")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Dense models that tests train are kept for the run, in place of the tester's cache, and shared by processes."""
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["XDG_CACHE_HOME"]
    else:
        os.environ["XDG_CACHE_HOME"] = before


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with data/ and weights/ that are not in the repository; a test that needs it skips without it."""
    folder = Path(os.environ.get("CHIP_DEPLOY_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    if not (folder / "weights").is_dir():
        pytest.skip(f"no {folder / 'weights'}; set CHIP_DEPLOY_SHARED to the folder that holds data/ and weights/")
    return folder


@pytest.fixture(scope="session")
def cifar10_test(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shared CIFAR-10 test images as an image folder; a few of them stand in for the training images."""
    archive = shared / "data" / "cifar10" / "cifar10-test.zip"
    if not archive.exists():
        pytest.skip(f"no {archive}; set CHIP_DEPLOY_SHARED to the folder that holds data/ and weights/")
    root = tmp_path_factory.mktemp("cifar10")
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(root)
    for class_folder in sorted((root / "test").iterdir()):
        few = root / "train" / class_folder.name
        few.mkdir(parents=True)
        first = min(class_folder.iterdir())
        (few / first.name).write_bytes(first.read_bytes())
    return root


def pytest_configure() -> None:
    """A shell that runs the tests in the background has them ignore Ctrl-C, and with them what they start."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Output is compared as an 80-column terminal without colours shows it, whatever the terminal of the tester."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.delenv("CHIP_DEPLOY_DEBUG", raising=False)
