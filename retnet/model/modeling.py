"""One decoder skeleton, two models on it: RetNetForCausalLM and TransformerForCausalLM.

Embedding, N pre-norm blocks of mixer and feed-forward network, final norm, output layer. The two
share everything but the mixer, its memory and its initialisation.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .attention import CausalAttention, attention_mask
from .cache import DecoderCache, KVCache, RetentionCache
from .configuration import DecoderConfig, RetNetConfig, TransformerConfig
from .generation import OwnCacheGenerationMixin
from .initialization import initialize
from .layers import MODES, FeedForward, MixerInputs, MultiScaleRetention, make_norm
from .linear import Linear
from .loss import causal_lm_loss, linear_cross_entropy, shift_targets
from .sequence import TokenInfo, describe_tokens


class DecoderLayer(GradientCheckpointingLayer):
    """A pre-norm block: x + mixer(norm(x)), then x + ffn(norm(x))."""

    def __init__(self, config: DecoderConfig, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer_norm = make_norm(config)
        self.mixer = mixer
        self.ffn_norm = make_norm(config)
        self.ffn = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, hidden: Tensor, inputs: MixerInputs, memory: Any = None, mode: str | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """[B, T, d] -> [B, T, d] and the mixer's new state."""
        mixed, state = self.mixer(self.mixer_norm(hidden), inputs, memory, mode)
        hidden = hidden + self.dropout(mixed)
        return hidden + self.dropout(self.ffn(self.ffn_norm(hidden))), state


class DecoderPreTrainedModel(PreTrainedModel):
    """Initialisation, loading and saving, for both models."""

    config: DecoderConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["DecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012

    def _init_weights(self, module: nn.Module) -> None:
        # transformers calls this for modules that have weights of their own, without their names
        name = next((name for name, other in self.named_modules() if other is module), "")
        initialize(module, name.rpartition(".")[2], self.config)


class DecoderModel(DecoderPreTrainedModel):
    """The skeleton without the output layer.

    The class attribute ``mixer_class`` is what makes it a RetNet or a Transformer.
    """

    mixer_class: type[MultiScaleRetention] | type[CausalAttention]

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, self.mixer_class(config, i))
            for i in range(config.num_hidden_layers)
        )
        self.norm = make_norm(config)
        self.dropout = nn.Dropout(config.dropout)
        self.gradient_checkpointing = False
        self.post_init()

    def new_cache(self, max_length: int | None = None) -> DecoderCache:
        """An empty memory; ``max_length`` columns are reserved at once where it grows."""
        raise NotImplementedError

    def mixer_inputs(
        self, tokens: TokenInfo, hidden: Tensor, cache: DecoderCache | None
    ) -> MixerInputs:
        """What all layers share in this forward pass."""
        raise NotImplementedError

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
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run the blocks; arguments as in ``DecoderForCausalLM.forward``."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if 0 in hidden.shape[:2]:
            raise ValueError(
                f"the batch is empty, its shape is {list(hidden.shape[:2])}: give at least one row "
                "of at least one token"
            )
        if kwargs.get("output_attentions"):
            raise ValueError("output_attentions (True) is not available: no form computes them all")
        cache = self._memory(past_key_values, use_cache)
        self._check_mode(mode)
        tokens = describe_tokens(
            hidden.shape[0],
            hidden.shape[1],
            hidden.device,
            attention_mask=attention_mask,
            segment_ids=segment_ids,
            position_ids=position_ids,
            record=None if cache is None else cache.record,
            past_length=0 if cache is None else cache.length,
        )
        inputs = self.mixer_inputs(tokens, hidden, cache)
        hidden = self.dropout(hidden)
        all_hidden = [hidden] if output_hidden_states else None
        for index, layer in enumerate(self.layers):
            memory = None if cache is None else cache.layers[index]
            hidden, state = layer(hidden, inputs, memory, mode)
            if memory is not None and state is not None:
                memory.state = state
            if all_hidden is not None:
                all_hidden.append(hidden)
        if cache is not None:
            cache.record = tokens.record
            cache.length += hidden.shape[1]
        hidden = self.norm(hidden)
        hidden = _repeat_at_padding(hidden, tokens.latest, cache)
        if all_hidden is not None:
            all_hidden[-1] = hidden
        return BaseModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=cache,
            hidden_states=None if all_hidden is None else tuple(all_hidden),
        )

    def _memory(
        self, past_key_values: DecoderCache | None, use_cache: bool | None
    ) -> DecoderCache | None:
        """The cache to read and write: the given one, a new one, or None."""
        checkpointing = self.gradient_checkpointing and self.training
        if past_key_values is None:
            if use_cache is None:
                use_cache = self.config.use_cache and not self.training
            return self.new_cache() if use_cache and not checkpointing else None
        expected = type(self.new_cache())
        if not isinstance(past_key_values, expected):
            raise TypeError(
                f"past_key_values ({type(past_key_values).__name__}) must be a "
                f"{expected.__name__}: take the one that the model returned, or model.new_cache()"
            )
        if checkpointing:
            raise ValueError(
                "past_key_values can't be combined with gradient checkpointing: a layer that is "
                "computed again would begin with a memory that has gone on"
            )
        return past_key_values

    def _check_mode(self, mode: str | None) -> None:
        if mode is None:
            return
        if self.mixer_class is CausalAttention:
            raise ValueError(f"mode ({mode!r}) is for retention only: leave it out for attention")
        if mode not in MODES:
            raise ValueError(f"mode ({mode!r}) must be one of {', '.join(MODES)}, or None")


def _repeat_at_padding(hidden: Tensor, latest: Tensor | None, cache: DecoderCache | None) -> Tensor:
    """Outputs at padding are those of the token before it: generate reads on from the last column.

    That token may lie in an earlier call, so the cache keeps each row's last output.
    """
    if latest is not None and hidden.shape[1] > 1:
        hidden = hidden.gather(1, latest.clamp(min=0)[..., None].expand_as(hidden))
    if cache is None:
        return hidden
    if latest is None:
        cache.last_hidden = None
        return hidden
    if cache.last_hidden is not None:
        hidden = torch.where(latest[..., None] < 0, cache.last_hidden[:, None], hidden)
    cache.last_hidden = hidden[:, -1].clone()
    return hidden


class RetNetModel(DecoderModel):
    """Embedding, blocks of retention, final norm."""

    config_class = RetNetConfig
    mixer_class = MultiScaleRetention

    def new_cache(self, max_length: int | None = None) -> RetentionCache:
        return RetentionCache(self.config.num_hidden_layers)

    def mixer_inputs(
        self, tokens: TokenInfo, hidden: Tensor, cache: DecoderCache | None
    ) -> MixerInputs:
        return MultiScaleRetention.shared_inputs(cast(RetNetConfig, self.config), tokens, hidden)


class TransformerModel(DecoderModel):
    """Embedding, blocks of causal attention, final norm."""

    config_class = TransformerConfig
    mixer_class = CausalAttention

    def new_cache(self, max_length: int | None = None) -> KVCache:
        return KVCache(self.config.num_hidden_layers, capacity=max_length or 0)

    def mixer_inputs(
        self, tokens: TokenInfo, hidden: Tensor, cache: DecoderCache | None
    ) -> MixerInputs:
        config = cast(TransformerConfig, self.config)
        mask = attention_mask(tokens, hidden, cast(KVCache | None, cache))
        return CausalAttention.shared_inputs(config, tokens, hidden, mask)


class DecoderForCausalLM(DecoderPreTrainedModel, OwnCacheGenerationMixin):
    """A language model: the skeleton, an output layer, a loss."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    model_class: type[DecoderModel]

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = self.model_class(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def new_cache(self, max_length: int | None = None) -> DecoderCache:
        """An empty memory to pass as ``past_key_values``; it is updated in place.

        Args:
            max_length: Columns to reserve at once in a KV cache; a retention state needs none.
        """
        return self.model.new_cache(max_length)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DecoderCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        segment_ids: Tensor | None = None,
        mode: str | None = None,
        num_items_in_batch: Tensor | int | None = None,
        return_logits: bool = True,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits of the next token at each position.

        Args:
            input_ids: int64 [B, T].
            attention_mask: 0/1 [B, T] (or [B, past + T]); 0 is padding, on any side. Decay and
                positions count unmasked tokens; logits at padding repeat those before it.
            position_ids: int64 [B, T]; only rotate. A value not above the one before begins a new
                document.
            past_key_values: Memory of the earlier calls, from the output of one or ``new_cache``;
                updated in place.
            inputs_embeds: [B, T, d] in place of ``input_ids``.
            labels: int64 [B, T], -100 to ignore; the logits of token t are compared with label
                t + 1, unless that begins another document or either of the two is padding.
            use_cache: Whether to return the memory; by default ``config.use_cache`` in eval mode.
            logits_to_keep: Only the logits of the last n positions (0: of all), or of these ones.
            segment_ids: int64 [B, T]; a change of id begins a new document, which knows nothing of
                the ones before.
            mode: "parallel", "chunkwise", "recurrent" or None, the fastest right one; attention
                takes None only.
            shift_labels: int64 [B, T], labels already shifted: compared as they are. (Among the
                keywords, because transformers' Trainer takes every named "label" for required.)
            num_items_in_batch: What the summed loss is divided by; the number of targets if None.
            return_logits: False computes the loss alone, chunk by chunk, in less memory and time;
                the output's logits are then None.
            output_hidden_states: Also return the T x d activations before and after each block.
            return_dict: False for a tuple.

        Returns:
            loss (a scalar, when there are labels), logits [B, T, vocab_size], past_key_values.

        Raises:
            ValueError, TypeError: Arguments that do not fit together; the message names them.
        """
        shift_labels: Tensor | None = kwargs.pop("shift_labels", None)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            segment_ids=segment_ids,
            mode=mode,
            output_hidden_states=output_hidden_states,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        if isinstance(logits_to_keep, Tensor):
            hidden = hidden[:, logits_to_keep]
        elif logits_to_keep:
            hidden = hidden[:, -logits_to_keep:]
        loss = None
        if labels is not None or shift_labels is not None:
            if hidden.shape[1] != outputs.last_hidden_state.shape[1]:
                raise ValueError("labels need all logits: leave out logits_to_keep")
            if shift_labels is None:
                assert labels is not None
                shift_labels = shift_targets(labels, attention_mask, segment_ids, position_ids)
        if return_logits:
            logits = self.lm_head(hidden)
            if shift_labels is not None:
                loss = causal_lm_loss(logits, shift_labels, num_items_in_batch)
        elif shift_labels is not None:
            logits = None
            weight = self.lm_head.weight
            loss = linear_cross_entropy(hidden, weight, shift_labels, num_items_in_batch)
        else:
            raise ValueError("return_logits (False) leaves nothing to return without labels")
        result = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )
        return result.to_tuple() if return_dict is False else result


class RetNetForCausalLM(DecoderForCausalLM):
    """A RetNet language model (arXiv 2307.08621)."""

    config_class = RetNetConfig
    model_class = RetNetModel
    _is_stateful = True  # a state can't go back: transformers then refuses assisted decoding


class TransformerForCausalLM(DecoderForCausalLM):
    """The Transformer of the same size."""

    config_class = TransformerConfig
    model_class = TransformerModel
