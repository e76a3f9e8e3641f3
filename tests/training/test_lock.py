"""A run folder belongs to one run from the first moment, and is gone where nothing came of it."""

import threading
from pathlib import Path

import pytest

from retnet.errors import UserError
from retnet.training import run as module
from retnet.training.run_folder import RunLock
from tests.training.test_resume import error_line
from tests.training.test_run_folder import tree
from tests.training.test_train import metrics, run


def test_a_second_run_into_a_folder_that_is_new(options, tmp_path: Path, capsys) -> None:
    """It came while the first still prepared its data, and both wrote there."""
    real, codes = module.prepare_data, []

    def second(spec):
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(module, "prepare_data", real)
            codes.append(run(options, train__max_steps=9))
        return real(spec)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "prepare_data", second)
        assert run(options) == 0
    assert codes == [2]
    assert f"error: train.out_dir ({tmp_path / 'run'}) is in use by an" in capsys.readouterr().err
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def test_the_start_is_planned_in_a_folder_that_is_locked(options, tmp_path: Path) -> None:
    """What a run sees there must still be so when it writes."""
    real, seen = module.plan_start, []

    def planned(*args):
        with pytest.raises(UserError, match="in use by another run"):
            RunLock(tmp_path / "run").acquire()
        seen.append(1)
        return real(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "plan_start", planned)
        assert run(options, train__max_steps=2) == 0
    assert seen == [1]


@pytest.mark.parametrize("there", [False, True])
def test_a_run_that_wrote_nothing_leaves_nothing(
    options, tmp_path: Path, capsys, there: bool
) -> None:
    folder = tmp_path / "new/and/run"
    if there:
        folder.mkdir(parents=True)
        (folder / "notes.txt").write_text("mine")
    before = tree(tmp_path)
    assert run(options, train__out_dir=folder, data__source=tmp_path / "no.txt") == 2
    assert "no.txt) does not exist" in error_line(capsys)
    assert tree(tmp_path) == before


def test_a_lock_file_that_is_there_stays(finished: Path) -> None:
    lock = RunLock(finished)
    lock.acquire()
    lock.release()
    assert (finished / ".lock").exists()


def test_many_take_and_remove_the_same_folder(tmp_path: Path) -> None:
    """Never two at once, whoever removes the lock file of whom, and nothing else goes wrong."""
    folder, inside, got, wrong = tmp_path / "a/b", [], [], []

    def work() -> None:
        for _ in range(200):
            lock = RunLock(folder)
            try:
                lock.acquire()
            except UserError as error:
                if "in use" not in str(error):
                    wrong.append(error)
                continue
            inside.append(1)
            if len(inside) > 1:
                wrong.append("two at once")
            got.append(1)
            inside.pop()
            lock.release()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(got) > 10
    if folder.exists():  # two met while one removed it: a lock file is all that may stay
        assert [path.name for path in folder.iterdir()] in ([], [".lock"])
