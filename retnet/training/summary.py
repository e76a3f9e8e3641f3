"""What a run says of itself before it begins: size, memory, data, windows, device."""

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from retnet.data import CarriedBatches, PreparedData, TrainingBatches
from retnet.model.configuration import DecoderConfig
from retnet.training.build import Model, build_model
from retnet.training.config import Config

GIB = 2**30
PARTS = {
    "embed_tokens": "embedding",
    "lm_head": "output",
    "mixer": "mixers",
    "ffn": "feed-forward",
}


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Parameters by part, "total" first; a tied matrix counts once, as embedding."""
    parts = {"total": 0, **dict.fromkeys(PARTS.values(), 0), "norms": 0}
    for name, parameter in model.named_parameters():
        words = name.split(".")
        part = next((PARTS[word] for word in words if word in PARTS), "norms")
        parts[part] += parameter.numel()
        parts["total"] += parameter.numel()
    return parts


def estimate_memory(
    model_config: DecoderConfig,
    *,
    batch_size: int,
    seq_len: int,
    gradient_checkpointing: bool = False,
) -> dict[str, int]:
    """Bytes that training takes in float32, found by a dry run without memory or arithmetic.

    Args:
        model_config: The model.
        batch_size: Rows in a micro-batch.
        seq_len: Tokens in a row.
        gradient_checkpointing: Whether blocks are recomputed.

    Returns:
        Bytes of "weights", "gradients", "optimizer" and "activations" (what the backward pass needs
        of one micro-batch).
    """
    with FakeTensorMode():  # tensors of the real device, so that it takes the real kernels
        model = build_model(model_config).train()
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
    return {
        "weights": weights,
        "gradients": weights,
        "optimizer": 2 * weights,
        "activations": sum(saved.values()),
    }


def describe_run(
    config: Config,
    model: Model,
    data: PreparedData,
    batches: TrainingBatches | CarriedBatches,
    *,
    device: str,
    precision: str,
    processes: int,
) -> list[str]:
    """The lines that ``train.py`` prints before the first step."""
    spec = config.train
    parts = count_parameters(model)
    detail = ", ".join(f"{name} {n:,}" for name, n in parts.items() if name != "total" and n)
    memory = estimate_memory(
        model.config,
        batch_size=spec.batch_size,
        seq_len=config.data.seq_len,
        gradient_checkpointing=spec.gradient_checkpointing,
    )
    memory_detail = ", ".join(f"{name} {_size(n)}" for name, n in memory.items())
    per_step = batches.global_batch * config.data.seq_len
    seen = per_step * spec.max_steps
    train, validation = data.train, data.validation
    lines = [
        f"model       {config.model.mixer}, {parts['total']:,} parameters ({detail})",
        f"memory      about {_size(sum(memory.values()))} in each process ({memory_detail})",
        f"corpus      {train.num_tokens:,} training tokens in {train.num_documents:,} documents, "
        f"{validation.num_tokens:,} validation tokens in {validation.num_documents:,}; "
        f"{len(data.tokenizer):,} entries in the vocabulary",
        f"training    {spec.max_steps:,} steps of {per_step:,} tokens: {seen:,} tokens, "
        f"{batches.epoch(spec.max_steps):.2f} times the corpus",
    ]
    lines += model.config.mixer_class.describe(model.config)
    count = f"{processes} process" + ("es" if processes > 1 else "")
    lines.append(
        f"device      {device}, {precision}, {count}, {torch.get_num_threads()} CPU threads each"
    )
    lines.append(f"run folder  {spec.out_dir}")
    return lines


def _size(count: float) -> str:
    unit, name = (GIB, "GiB") if count >= GIB / 10 else (GIB / 1024, "MiB")
    return f"{count / unit:.{1 if unit < GIB else 2}f} {name}"
