import pytest
import torch


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    """An empty Minari root of this test's own."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "datasets"))
    return tmp_path / "datasets"


@pytest.fixture(autouse=True)
def one_thread():
    """Networks this small only wait for each other on several threads, for minutes on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
