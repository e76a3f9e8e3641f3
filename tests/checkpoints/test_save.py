"""Checkpoints are complete or absent, small parts exact."""

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from retnet import RetNetForCausalLM
from retnet.checkpoints import Progress, Snapshot, load_checkpoint_state, save_checkpoint
from retnet.checkpoints.format import list_checkpoints, step_folder
from retnet.checkpoints.save import prune_checkpoints, remove_unfinished
from retnet.data import load_tokenizer
from retnet.errors import UserError
from retnet.training.build import build_model, model_config
from retnet.training.config import load_config
from retnet.training.optimizer import build_optimizer
from tests.permissions import bound_by_permissions


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def trained(request):
    """A model and an optimizer that took two steps."""
    tied = f"model.tie_word_embeddings={str(request.param).lower()}"
    config = load_config(None, ["model.hidden_size=16", "model.num_hidden_layers=1", tied])
    model = build_model(model_config(config, 259))
    optimizer = build_optimizer(model, config.train)
    for _ in range(2):
        ids = torch.randint(0, 259, (2, 8))
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return config, model, optimizer


SNAPSHOT = Snapshot(load_tokenizer("bytes"), {"source": "somewhere"})


def test_weights_moments_and_progress_come_back(trained, tmp_path: Path) -> None:
    config, model, optimizer = trained
    progress = Progress(step=2, best_loss=1.5, best_step=1, seconds=3.0, global_batch=2)
    save_checkpoint(tmp_path / "c", model, model, optimizer, progress, SNAPSHOT)
    other = build_model(model_config(config, 259))
    fresh = build_optimizer(other, config.train)
    assert load_checkpoint_state(tmp_path / "c", other, fresh) == progress
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        for key, value in optimizer.state[a].items():
            assert torch.equal(value, fresh.state[b][key])
    if config.model.tie_word_embeddings:
        assert other.lm_head.weight is other.model.embed_tokens.weight


def test_the_folder_alone_suffices(trained, tmp_path: Path) -> None:
    _, model, optimizer = trained
    save_checkpoint(tmp_path / "c", model, model, optimizer, Progress(), SNAPSHOT)
    assert {p.name for p in (tmp_path / "c").iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json", "data.json", "optimizer.safetensors", "training_state.json",
        "manifest.json",
    }  # fmt: skip
    loaded = RetNetForCausalLM.from_pretrained(tmp_path / "c").eval()
    ids = torch.arange(5)[None]
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)
    assert json.loads((tmp_path / "c" / "data.json").read_text()) == {"source": "somewhere"}


def test_a_checkpoint_without_moments_is_not_gone_on_from(trained, tmp_path: Path) -> None:
    _, model, optimizer = trained
    save_checkpoint(tmp_path / "c", model, model, None, Progress(), SNAPSHOT)
    with pytest.raises(UserError, match=r"has no optimizer\.safetensors"):
        load_checkpoint_state(tmp_path / "c", model, optimizer)


@pytest.mark.parametrize(
    ("file", "damage", "words"),
    [
        ("model", "garbage", "can't be read"),
        ("model", "integers", "model.norm.weight is of torch.int64"),
        ("optimizer", "garbage", "can't be read"),
        ("optimizer", "integers", "model.norm.weight/exp_avg is of torch.int64"),
        (
            "optimizer",
            "less",
            "model.norm.weight/exp_avg is absent there",
        ),
        ("model", "inf", "has values that are not finite (model.norm.weight)"),
        ("optimizer", "inf", "safetensors has values that are not finite (model.norm.weight/exp_a"),
        ("optimizer", "others", "is of another optimizer, it has momentum_buffer and here are exp"),
        ("optimizer", "negative", "safetensors: model.norm.weight/exp_avg_sq is below 0: copy"),
    ],
)
def test_tensors_of_another_kind(trained, tmp_path: Path, file: str, damage: str, words: str):
    _, model, optimizer = trained
    save_checkpoint(tmp_path / "c", model, model, optimizer, Progress(), SNAPSHOT)
    path = tmp_path / "c" / f"{file}.safetensors"
    tensors = load_file(path)
    name = "model.norm.weight" + "/exp_avg" * (file == "optimizer")
    if damage == "less":
        del tensors[name]
    elif damage == "inf":
        tensors[name][3] = torch.inf
    elif damage == "others":
        own = {key.rpartition("/")[0]: tensor for key, tensor in tensors.items()}
        tensors = {f"{key}/momentum_buffer": tensor for key, tensor in own.items()}
    elif damage == "negative":
        tensors[f"{name}_sq"][3] = -1
    else:
        tensors[name] = tensors[name].long()
    save_file(tensors, path)
    if damage == "garbage":
        path.write_bytes(b"none")
    with pytest.raises(UserError) as caught:
        load_checkpoint_state(tmp_path / "c", model, optimizer)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("mask", [0o077, 0o022, 0o002])
def test_files_have_the_permissions_of_new_files(trained, tmp_path: Path, mask: int) -> None:
    _, model, optimizer = trained
    before = os.umask(mask)
    try:
        save_checkpoint(tmp_path / "c", model, model, optimizer, Progress(), SNAPSHOT)
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "c").iterdir()}
    assert set(modes.values()) == {0o666 & ~mask}, modes


def test_an_interrupted_write_is_no_checkpoint(
    trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, model, optimizer = trained
    folder = step_folder(tmp_path, 1)
    save_checkpoint(folder, model, model, optimizer, Progress(step=1), SNAPSHOT)

    def fail(*_) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("retnet.checkpoints.save.save_file", fail)
    for target in (step_folder(tmp_path, 2), folder):
        with pytest.raises(OSError, match="No space"):
            save_checkpoint(target, model, model, optimizer, Progress(step=2), SNAPSHOT)
    assert list_checkpoints(tmp_path) == [folder]
    assert json.loads((folder / "training_state.json").read_text())["step"] == 1
    remove_unfinished(tmp_path)
    assert [p.name for p in folder.parent.iterdir()] == ["step_1"]


def test_a_folder_is_replaced_as_a_whole(trained, tmp_path: Path) -> None:
    _, model, _ = trained
    for step in (1, 2):
        save_checkpoint(tmp_path / "best", model, model, None, Progress(step=step), SNAPSHOT)
    assert json.loads((tmp_path / "best" / "training_state.json").read_text())["step"] == 2
    assert [p.name for p in tmp_path.iterdir()] == ["best"]


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_sharded_model_writes_and_reads_plain_checkpoints(
    trained, process_group, tmp_path: Path
) -> None:
    """What FSDP2 makes of a model, with one process on the CPU: whole tensors, plain names."""
    config, model, optimizer = trained
    save_checkpoint(tmp_path / "plain", model, model, optimizer, Progress(step=2), SNAPSHOT)
    sharded = build_model(model_config(config, 259))
    for layer in sharded.model.layers:
        fully_shard(layer)
    fully_shard(sharded)
    fresh = build_optimizer(sharded, config.train)
    load_checkpoint_state(tmp_path / "plain", sharded, fresh)
    assert all(isinstance(parameter, DTensor) for parameter in sharded.parameters())
    save_checkpoint(tmp_path / "sharded", sharded, sharded, fresh, Progress(step=2), SNAPSHOT)
    for name in ("model.safetensors", "optimizer.safetensors"):
        a, b = load_file(tmp_path / "plain" / name), load_file(tmp_path / "sharded" / name)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a), name
    wider = load_config(None, ["model.hidden_size=32", "model.num_hidden_layers=1"])
    other = build_model(model_config(wider, 259))
    save_checkpoint(tmp_path / "wider", other, other, None, Progress(), SNAPSHOT)
    (tmp_path / "wider/optimizer.safetensors").touch()
    with pytest.raises(UserError, match="is another model"):
        load_checkpoint_state(tmp_path / "wider", sharded, fresh)


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 9, 10, 11):
        step_folder(tmp_path, step).mkdir(parents=True)
    prune_checkpoints(tmp_path, keep=3)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step_9", "step_10", "step_11"]


def test_what_is_protected_or_a_link_or_a_file_costs_no_run(tmp_path: Path, caplog) -> None:
    """The protected one had lost its name."""
    for step in range(1, 5):
        step_folder(tmp_path, step).mkdir(parents=True)
        (step_folder(tmp_path, step) / "a").write_text("a")
    disk = step_folder(tmp_path, 1).rename(tmp_path / "disk")
    step_folder(tmp_path, 1).symlink_to(disk)
    step_folder(tmp_path, 0).write_text("a file of mine")
    protected = step_folder(tmp_path, 2)
    protected.chmod(0o555)
    with bound_by_permissions():
        prune_checkpoints(tmp_path, 1)
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {"step_0", "step_2", "step_4"} and (disk / "a").exists()
    assert caplog.messages == [
        f"{protected} is older than train.keep and stays (Permission denied)"
    ]
