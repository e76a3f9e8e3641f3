"""The language model around the skeleton: output layer and loss."""

from typing import Any

import torch
from torch import Tensor, nn

from .cache import DecoderCache
from .decoder import DecoderModel, DecoderPreTrainedModel
from .keywords import one_memory, packed_segments
from .loss import causal_lm_loss, linear_cross_entropy, shift_targets
from .outputs import CausalLMOutput, as_wanted, named


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
            inputs_embeds: [B, T, d] in place of ``input_ids``; the embedding's own numbers, before
                ``scale_embedding``.
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
        return as_wanted(result, return_dict, self.config)
