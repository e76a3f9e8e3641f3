"""The skeleton that all models share: a decoder around the mixer that its configuration names.

Embedding, N pre-norm blocks of mixer and feed-forward network, final norm, output layer.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .block import DecoderLayer, Shared
from .cache import DecoderCache, LayerState
from .configuration import DecoderConfig
from .documents import TokenInfo, describe_tokens, repeat_at_padding
from .keywords import one_memory, packed_segments, refuse
from .layers import make_norm
from .mixers.base import Part
from .outputs import NAMES, DecoderOutput, as_wanted, named
from .quantised import QuantisedLinear


class DecoderPreTrainedModel(PreTrainedModel):
    """Initialisation, loading and saving, for all models."""

    config: DecoderConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["DecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = list(NAMES)  # noqa: RUF012

    if not hasattr(PreTrainedModel, "activation_checkpointing_enable"):  # transformers < 5.23

        def activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
            self.gradient_checkpointing_enable(*args, **kwargs)

    def _init_weights(self, module: nn.Module) -> None:
        # transformers calls this for modules that have weights of their own, without their names
        name = next((name for name, other in self.named_modules() if other is module), "")
        _, in_layers, rest = name.rpartition("layers.")
        kind, config = self.config.mixer_class, self.config
        if in_layers:
            index = int(rest.split(".")[0])
            kind, config = config.mixer_of(index), config.config_of(index)
        kind.initialize(module, name.rpartition(".")[2], config)

    def post_init(self) -> None:
        self._keep_in_fp32_modules_strict = set(self.wide_names())
        super().post_init()

    def wide_names(self) -> list[str]:
        """Names of the weights that are never below float32."""
        parts = [(name, part) for name, part in self.named_modules() if isinstance(part, Part)]
        return [f"{name}.{own}" for name, part in parts for own in part.wide]

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """As transformers counts them, and the weights that are quantised, which none can train."""
        plain: int = super().num_parameters(only_trainable, exclude_embeddings)
        if only_trainable:
            return plain
        quantised = (x for x in self.modules() if isinstance(x, QuantisedLinear))
        return plain + sum(x.in_features * x.out_features for x in quantised)

    def after_step(self, step: int, seed: int) -> None:
        """To be called in training after each optimizer step 1, 2, ..., see ``Part``."""
        for part in self.modules():
            if isinstance(part, Part):
                part.after_step(step, seed)


class DecoderModel(DecoderPreTrainedModel):
    """The skeleton without the output layer."""

    _keys_to_ignore_on_load_unexpected = [r"^lm_head\."]  # noqa: RUF012  # a language model's

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embedding_scale = math.sqrt(config.hidden_size) if config.scale_embedding else None
        self.embed_positions = None
        if config.positions == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.embed_norm = make_norm(config) if config.embedding_norm else None
        self.layers = nn.ModuleList(
            DecoderLayer(own, config.mixer_of(i)(own, i))
            for i, own in enumerate(map(config.config_of, range(config.num_hidden_layers)))
        )
        self.norm = make_norm(config)
        self.dropout = nn.Dropout(config.dropout)
        self.gradient_checkpointing = False
        # transformers' from_pretrained knows them by the last word
        self.post_init()

    def new_cache(self, max_length: int | None = None) -> DecoderCache:
        """An empty memory; ``max_length`` tokens are reserved at once where it grows."""
        config = self.config
        indices = range(config.num_hidden_layers)
        growing = [config.mixer_of(i).growing(config.config_of(i)) for i in indices]
        return DecoderCache(growing, capacity=max_length)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DecoderCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        segment_ids: Tensor | None = None,
        mode: str | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache: DecoderCache | None = None,
        **kwargs: Any,
    ) -> DecoderOutput | tuple:
        """Run the blocks; arguments as in ``DecoderForCausalLM.forward``."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if self.embedding_scale is not None:
            hidden = hidden * self.embedding_scale
        if 0 in hidden.shape[:2]:
            raise ValueError(
                f"the batch is empty, its shape is {list(hidden.shape[:2])}: give at least one row "
                "of at least one token"
            )
        cache = self._memory(one_memory(past_key_values, cache), use_cache, hidden.shape[0])
        past = 0 if cache is None else cache.length
        segment_ids = packed_segments(kwargs, segment_ids, hidden.shape[:2], past)
        refuse(kwargs)
        self._check_mode(mode)
        rows = {} if cache is None else cache.rows
        tokens = describe_tokens(
            hidden,
            attention_mask=attention_mask,
            segment_ids=segment_ids,
            position_ids=position_ids,
            record=rows.get("record"),
            past=past,
        )
        self._check_length(tokens, position_ids is not None or bool(cache and cache.shifted))
        shared = Shared(self.layers, tokens, rows)
        if self.embed_positions is not None:
            positions = tokens.positions
            if tokens.valid is not None:  # at padding they may be anything
                positions = positions.masked_fill(~tokens.valid, 0)
            hidden = hidden + self.embed_positions(positions)
        if self.embed_norm is not None:
            hidden = self.embed_norm(hidden)
        hidden = self.dropout(hidden)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        all_hidden = [hidden] if output_hidden_states else None
        for index, layer in enumerate(self.layers):
            if cache is None:
                hidden, _, _ = layer(hidden, shared, None, None, mode)
            else:
                own = cache.layers[index]
                if not rows:
                    self._begin(layer, own, hidden, cache.capacity)
                hidden, own.mixer, own.ffn = layer(hidden, shared, own.mixer, own.ffn, mode)
            if all_hidden is not None:
                all_hidden.append(hidden)
        hidden = self.norm(hidden)
        if tokens.latest is not None:
            hidden = repeat_at_padding(hidden, tokens.latest, rows.get("last_hidden"))
        if cache is not None:
            if tokens.latest is not None:
                shared.rows["last_hidden"] = hidden[:, -1].clone()
            cache.rows = shared.rows
            cache.length += hidden.shape[1]
            cache.shifted |= position_ids is not None
        if all_hidden is not None:
            all_hidden[-1] = hidden
        result = DecoderOutput(
            last_hidden_state=hidden,
            hidden_states=None if all_hidden is None else tuple(all_hidden),
            **named(cache),
        )
        return as_wanted(result, return_dict, self.config)

    def _check_length(self, tokens: TokenInfo, given: bool) -> None:
        """Raise where a document is longer than what is indexed by position.

        Nothing is read back from a device where the tokens are few enough however they lie, nor
        while a program is made, which has no numbers yet.
        """
        longest, positions = self.config.longest, tokens.positions
        made = torch.compiler.is_compiling() or torch.jit.is_tracing() or positions.is_meta
        if longest is None or made or (tokens.past + tokens.shape[1] <= longest and not given):
            return
        if tokens.valid is not None:
            positions = positions.masked_fill(~tokens.valid, 0)
        first, last = positions.amin().item(), positions.amax().item()
        if first < 0 or last >= longest:
            raise ValueError(
                f"a document has positions {first} to {last}, and this model is not defined beyond "
                f"those from 0 to {longest - 1} (max_position_embeddings): give it a shorter text"
            )

    def _begin(self, layer: Any, own: LayerState, hidden: Tensor, capacity: int | None) -> None:
        """Put the states from before the first token."""
        given = hidden.shape[0], hidden.device, hidden.dtype, capacity
        own.mixer = layer.mixer.init_state(*given)
        own.ffn = layer.ffn.init_state(*given)

    def _memory(
        self, past_key_values: DecoderCache | None, use_cache: bool | None, rows: int
    ) -> DecoderCache | None:
        """The cache to read and write: the given one, a new one, or None."""
        checkpointing = self.gradient_checkpointing and self.training
        if past_key_values is None:
            if use_cache is None:
                use_cache = self.config.use_cache and not self.training
            return self.new_cache() if use_cache and not checkpointing else None
        own = self.new_cache()
        if not isinstance(past_key_values, DecoderCache):
            raise TypeError(
                f"past_key_values ({type(past_key_values).__name__}) must be a "
                f"{type(own).__name__}: take the one that the model returned, or model.new_cache()"
            )
        if [layer.growing for layer in past_key_values.layers] != [x.growing for x in own.layers]:
            raise TypeError(
                "past_key_values is of a model with other layers: take the one that this model "
                "returned, or model.new_cache()"
            )
        if past_key_values.batch_size not in (-1, rows):
            raise ValueError(
                f"past_key_values is of {past_key_values.batch_size} rows and the batch has {rows}:"
                " take a memory of the same rows (batch_repeat_interleave repeats each of them)"
            )
        if checkpointing:
            raise ValueError(
                "past_key_values can't be combined with gradient checkpointing: a layer that is "
                "computed again would begin with a memory that has gone on"
            )
        return past_key_values

    def _check_mode(self, mode: str | None) -> None:
        mixer = self.config.mixer_class
        if mode is None or mode in mixer.modes:
            return
        if not mixer.modes:
            raise ValueError(
                f"mode ({mode!r}) has no meaning for {mixer.name}, which has one form: leave it out"
            )
        raise ValueError(f"mode ({mode!r}) must be one of {', '.join(mixer.modes)}, or None")
