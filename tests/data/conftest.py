import pytest


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    """An empty Minari root of this test's own."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "datasets"))
    return tmp_path / "datasets"
