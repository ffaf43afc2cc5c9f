import pytest

from learneddyn.files import replaced_folder, surviving_folder


def fill(folder, text):
    with replaced_folder(folder) as fresh:
        (fresh / "content").write_text(text)


def test_a_save_replaces_the_whole_folder(tmp_path):
    folder = tmp_path / "model"
    fill(folder, "old")
    (folder / "stale").write_text("left over")
    fill(folder, "new")
    assert (folder / "content").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert not (folder / "stale").exists()


def test_an_error_while_writing_keeps_the_old_folder(tmp_path):
    folder = tmp_path / "model"
    fill(folder, "old")
    with pytest.raises(KeyboardInterrupt), replaced_folder(folder) as fresh:
        (fresh / "content").write_text("half")
        raise KeyboardInterrupt
    assert (folder / "content").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("renames_done", [0, 1])
def test_a_kill_inside_the_swap_leaves_a_readable_folder(tmp_path, monkeypatch, renames_done):
    folder = tmp_path / "model"
    fill(folder, "old")
    real, done = type(folder).rename, []

    def dying_rename(self, target):
        if len(done) == renames_done:
            raise KeyboardInterrupt
        done.append(self)
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(type(folder), "rename", dying_rename)
        with pytest.raises(KeyboardInterrupt):
            fill(folder, "new")
    assert (surviving_folder(folder) / "content").read_text() == "old"
    fill(folder, "newer")
    assert (surviving_folder(folder) / "content").read_text() == "newer"
