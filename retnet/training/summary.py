"""What a run says of itself before it begins: size, memory, data, windows, device."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from retnet.model.configuration import DecoderConfig
from retnet.training.build import build_model
from retnet.training.loop import Trainer
from retnet.training.muon import parameters_of_muon

GIB = 2**30
PARTS = {
    "embed_tokens": "embedding", "embed_positions": "positions", "lm_head": "output",
    "mixer": "mixers", "ffn": "feed-forward",
}  # fmt: skip


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Parameters by part, "total" first; a tied matrix counts once, as embedding."""
    parts = {"total": 0, **dict.fromkeys(PARTS.values(), 0), "norms": 0}
    for name, parameter in model.named_parameters():
        part = next((PARTS[word] for word in name.split(".") if word in PARTS), "norms")
        parts[part] += parameter.numel()
        parts["total"] += parameter.numel()
    return parts


def estimate_memory(
    config: DecoderConfig,
    *,
    batch_size: int,
    seq_len: int,
    gradient_checkpointing: bool = False,
    one_moment: int = 0,
) -> dict[str, int]:
    """Bytes that training takes in float32, found by a dry run without memory or arithmetic.

    "activations" are what the backward pass needs of one micro-batch. The optimizer keeps two
    moments of each parameter, but of ``one_moment`` of them one.
    """
    with FakeTensorMode():  # tensors of the real device, so that it takes the real kernels
        model = build_model(config).train()
        tokens = torch.zeros(batch_size, seq_len, dtype=torch.int64)
        if gradient_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        own = {p.untyped_storage()._cdata for p in model.parameters()}
        saved: dict[int, int] = {}
        held: list[Tensor] = []  # alive until the end, so that no identity is used twice

        def pack(x: Tensor) -> Tensor:
            storage = x.untyped_storage()
            if storage._cdata not in own:
                saved[storage._cdata] = storage.nbytes()
                held.append(x)
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model(tokens, shift_labels=tokens, return_logits=False)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    moments = 2 * weights - 4 * one_moment
    own_copies = {"weights": weights, "gradients": weights, "optimizer": moments}
    return own_copies | {"activations": sum(saved.values())}


def describe_run(trainer: Trainer) -> Iterator[str]:
    """The lines that ``train.py`` prints before the first step."""
    spec, seq_len, config = trainer.spec, trainer.config.data.seq_len, trainer.bare_model.config
    accelerator, batches = trainer.accelerator, trainer.batches
    parts = count_parameters(trainer.bare_model)
    detail = ", ".join(f"{name} {n:,}" for name, n in parts.items() if name != "total" and n)
    yield f"model       {trainer.config.model.mixer}, {parts['total']:,} parameters ({detail})"
    memory = estimate_memory(
        config,
        batch_size=spec.batch_size,
        seq_len=seq_len,
        gradient_checkpointing=spec.gradient_checkpointing,
        one_moment=sum(p.numel() for p in parameters_of_muon(trainer.optimizer)),
    )
    if spec.lora_rank:
        trained = sum(p.numel() for p in trainer.bare_model.parameters() if p.requires_grad)
        memory |= {"gradients": 4 * trained, "optimizer": 8 * trained}
        yield f"lora        rank {spec.lora_rank}: {trained:,} of these parameters are trained"
    detail = ", ".join(f"{name} {_size(n)}" for name, n in memory.items())
    yield f"memory      about {_size(sum(memory.values()))} in each process ({detail})"
    train, validation = trainer.data.train, trainer.data.validation
    yield (
        f"corpus      {train.num_tokens:,} training tokens in {train.num_documents:,} documents, "
        f"{validation.num_tokens:,} validation tokens in {validation.num_documents:,}; "
        f"{len(trainer.data.tokenizer):,} entries in the vocabulary"
    )
    if trainer.config.data.is_messages:
        sides = f"{train.num_targets:,} of the training tokens, {validation.num_targets:,} of the"
        yield f"targets     {sides} validation tokens: what the assistant says, and its end"
    per_step = batches.global_batch * seq_len
    yield (
        f"training    {spec.max_steps:,} steps of {per_step:,} tokens: "
        f"{per_step * spec.max_steps:,} tokens, {batches.epoch(spec.max_steps):.2f} times the "
        "corpus"
    )
    yield from describe_heads(config)
    device, processes = accelerator.device, accelerator.num_processes
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    precision = "bf16" if accelerator.mixed_precision == "bf16" else "fp32"
    yield (
        f"device      {name}, {precision}, {processes} process{'es' * (processes > 1)}, "
        f"{torch.get_num_threads()} CPU threads each"
    )
    yield f"run folder  {spec.out_dir}"
    if spec.export_code != "none" and trainer.code is None:
        yield (
            f"checkpoints need this package: mixer {trainer.config.model.mixer} has no class in "
            f"retnet/model/models.py, so train.export_code ({spec.export_code}) has no effect"
        )


def describe_heads(config: DecoderConfig) -> Iterator[str]:
    """What the heads of a model's mixers do, as their windows, where there is something to say."""
    layers = range(config.num_hidden_layers)
    for kind, own in {config.mixer_of(i): config.config_of(i) for i in layers}.items():
        yield from kind.describe(own)


def _size(count: float) -> str:
    unit, name = (GIB, "GiB") if count >= GIB / 10 else (GIB / 1024, "MiB")
    return f"{count / unit:.{1 if unit < GIB else 2}f} {name}"
