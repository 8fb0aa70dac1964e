"""`RegressionLM` among the models of transformers (extra `hf`): importing this module makes its Auto classes know it.

import ttr.models.hf
model = AutoModelForCausalLM.from_pretrained("folder")       # what ttr export --transformers true wrote
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from ttr._design_data import designs_from_data, designs_to_data
from ttr.layers import Cache
from ttr.models.language_model import RegressionLM

try:
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
    from transformers.utils.generic import ModelOutput
except ImportError as error:
    raise ImportError("ttr.models.hf: expected the extra hf to be installed: pip install 'transformers>=5'") from error


class RegressionConfig(PreTrainedConfig):
    """Of a `RegressionForCausalLM`, in JSON.

    Args:
        vocab_size: number of tokens.
        arguments: every other argument of `RegressionLM`; a design as its slug, a `ttr.Design` or what `ttr export`
            writes for one, or a list of them.
        **kwargs: what all configurations of transformers have.

    Raises `ValueError` for a choice that is not one of `ttr`'s.
    """

    model_type = "test_time_regression"

    def __init__(self, vocab_size: int = 256, arguments: Mapping[str, Any] | None = None, **kwargs: Any):
        self.vocab_size = vocab_size
        self.arguments = dict(arguments or {})
        if "design" in self.arguments:
            self.arguments["design"] = designs_to_data(self.arguments["design"])
        self.tie_word_embeddings = True
        super().__init__(**kwargs)

    @property
    def hidden_size(self) -> int:
        return self.arguments.get("d_model", 128)

    @property
    def num_hidden_layers(self) -> int:
        return self.arguments.get("num_layers", 2)

    def make_model(self) -> RegressionLM:
        arguments = dict(self.arguments)
        if "design" in arguments:
            arguments["design"] = designs_from_data(arguments["design"])
        return RegressionLM(self.vocab_size, **arguments)


class RegressionCache:
    """What the blocks remember between calls; of fixed size for designs whose states are."""

    def __init__(self, blocks: list[Cache], length: int):
        self.blocks, self.length = blocks, length

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read so far."""
        return self.length

    def reorder_cache(self, beam_idx: Int[Tensor, " beams"]) -> None:
        """Go on from these of the batch's sequences: for beam search."""

        def chosen(x: Tensor) -> Tensor:
            return x.index_select(0, beam_idx.to(x.device))

        self.blocks = [
            Cache(block.state and block.state.map(chosen), {name: chosen(x) for name, x in block.past.items()})
            for block in self.blocks
        ]


@dataclass
class RegressionOutput(ModelOutput):
    """Loss where there are labels, logits (batch, time, vocab), and the cache."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    cache: RegressionCache | None = None


class RegressionForCausalLM(PreTrainedModel, GenerationMixin):
    """A `RegressionLM` with what transformers expects: labels, `generate`, `save_pretrained`, `from_pretrained`.

    Padding has to stand at the end of sequences: a memory reads every token, and one that comes later changes nothing
    before it. Raises `ValueError` for an attention mask with zeros before ones, or with any zeros in `generate`.
    """

    config_class = RegressionConfig
    config: RegressionConfig
    base_model_prefix = "model"
    _tied_weights_keys = {"model.head.weight": "model.embedding.weight"}  # noqa: RUF012
    _no_split_modules = ["Block"]  # noqa: RUF012
    _is_stateful = True  # of a cache there is no part without its last tokens

    def __init__(self, config: RegressionConfig):
        super().__init__(config)
        self.model = config.make_model()
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Layers have initialized themselves."""

    def get_input_embeddings(self) -> torch.nn.Embedding:
        return self.model.embedding

    def set_input_embeddings(self, value: torch.nn.Module) -> None:
        self.model.embedding = value

    def get_output_embeddings(self) -> torch.nn.Linear:
        return self.model.head

    def set_output_embeddings(self, new_embeddings: torch.nn.Module) -> None:
        self.model.head = new_embeddings

    def forward(
        self,
        input_ids: Int[Tensor, "batch time"],
        attention_mask: Tensor | None = None,
        labels: Int[Tensor, "batch time"] | None = None,
        cache: RegressionCache | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> RegressionOutput | tuple[Any, ...]:
        """Logits of every next token; labels are the tokens themselves, −100 where nothing is asked."""
        if attention_mask is not None and (attention_mask[:, 1:] > attention_mask[:, :-1]).any():
            raise ValueError("attention_mask: expected padding at the end of sequences only, got some before a token")
        kept = None
        if use_cache or cache is not None:
            logits, blocks = self.model.extend(input_ids, cache and cache.blocks)
            kept = RegressionCache(blocks, input_ids.shape[1] + (cache.length if cache else 0))
        else:
            logits = self.model(input_ids)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        output = RegressionOutput(loss=loss, logits=logits, cache=kept)
        return output.to_tuple() if return_dict is False else output

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # forward makes its own

    def prepare_inputs_for_generation(
        self,
        input_ids: Int[Tensor, "batch time"],
        attention_mask: Tensor | None = None,
        cache: RegressionCache | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The tokens that the cache has not read."""
        if cache is None and attention_mask is not None and not attention_mask.all():
            raise ValueError("attention_mask: expected no padding in generate, got some; group prompts by their length")
        return {"input_ids": input_ids[:, cache.length if cache else 0 :], "cache": cache, "use_cache": use_cache}


AutoConfig.register(RegressionConfig.model_type, RegressionConfig, exist_ok=True)
AutoModelForCausalLM.register(RegressionConfig, RegressionForCausalLM, exist_ok=True)
