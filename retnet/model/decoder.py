"""The skeleton that all models share: a decoder around the mixer that its configuration names.

Embedding, N pre-norm blocks of mixer and feed-forward network, final norm, output layer.
"""

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
from .loss import causal_lm_loss, linear_cross_entropy, shift_targets
from .mixers.base import Part
from .outputs import NAMES, CausalLMOutput, DecoderOutput, named


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
        return _as_wanted(result, return_dict, self.config)

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


def _as_wanted(result: Any, return_dict: bool | None, config: DecoderConfig) -> Any:
    """The output, or the tuple of its values where that is asked for."""
    wanted = config.return_dict if return_dict is None else return_dict
    return result if wanted else result.to_tuple()


class DecoderForCausalLM(DecoderPreTrainedModel):
    """A language model: the skeleton, an output layer, a loss."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    model_class: type[DecoderModel]

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = self.model_class(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def new_cache(self, max_length: int | None = None) -> DecoderCache:
        """An empty memory to pass as ``past_key_values``; it is updated in place.

        ``max_length`` tokens are reserved at once in a state that grows.
        """
        return self.model.new_cache(max_length)

    @property
    def grows(self) -> bool:
        """Whether its state grows with the text."""
        return self.bytes_per_token > 0

    @property
    def bytes_per_token(self) -> int:
        """What a token adds to the state of a row; 0 where that has a constant size."""
        total = 0
        for layer in self.model.layers:
            names = layer.mixer.growing(layer.mixer.config)
            state = layer.mixer.init_state(1, torch.device("meta"), self.dtype, 1) if names else {}
            total += sum(state[name].nbytes for name in names)
        return total

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
        cache: DecoderCache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutput | tuple:
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
            mode: One of the mixer's forms, for retention "parallel", "chunkwise" or "recurrent";
                None is the fastest right one.
            shift_labels: int64 [B, T], labels already shifted: compared as they are. (Among the
                keywords, because transformers' Trainer takes every named "label" for required.)
            num_items_in_batch: What the summed loss is divided by; the number of targets if None.
            return_logits: False computes the loss alone, chunk by chunk, in less memory and time;
                the output's logits are then None.
            output_hidden_states: Also return the T x d activations before and after each block.
            return_dict: False for a tuple.
            cache: ``past_key_values`` by its newer name in transformers.
            decode_step: (among the keywords) a ``DecodeStep`` that takes these tokens in place of
                the blocks; ``generate`` gives it.
            seq_idx, cu_seqlens, ...: (among the keywords) see ``keywords.packed_segments``.

        Returns:
            loss (a scalar, when there are labels), logits [B, T, vocab_size], past_key_values.

        Raises:
            ValueError, TypeError: Arguments that do not fit together, or that mean nothing here;
                the message names them.
        """
        past_key_values = one_memory(past_key_values, cache)
        step = kwargs.pop("decode_step", None)
        if step is not None and input_ids is not None and past_key_values is not None:
            logits = step(input_ids[:, 0], past_key_values)[:, None]
            return CausalLMOutput(logits=logits, **named(past_key_values))
        shift_labels: Tensor | None = kwargs.pop("shift_labels", None)
        given = input_ids if inputs_embeds is None else inputs_embeds
        if given is not None:
            past = 0 if past_key_values is None else past_key_values.get_seq_length()
            segment_ids = packed_segments(kwargs, segment_ids, given.shape[:2], past)
        outputs: Any = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            segment_ids=segment_ids,
            mode=mode,
            output_hidden_states=output_hidden_states,
            return_dict=True,
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
        result = CausalLMOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            **named(outputs.past_key_values),
        )
        return _as_wanted(result, return_dict, self.config)
