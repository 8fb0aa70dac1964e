"""Any text data set of the Hugging Face Hub, or of a local folder, through a tokenizer."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ttr.tasks.task import Batch, Task, require, require_at_least

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


class TokenizedText(Task):
    """Next-token prediction on a text data set by its name, read through a tokenizer.

    The data set is tokenized once, into the cache of `datasets`, with an end-of-text token behind every document, and
    cut into blocks of length + 1 tokens; a thousand documents' last, incomplete block is left out. Blocks stay on
    disk and are read where they lie. Training draws blocks at random, anew each epoch; validation and test blocks are
    spread evenly over their splits and are the same for every seed.

    Args:
        dataset: a name on the Hub, a format such as "text", "json" or "parquet" (with data_files), or a folder that
            `save_to_disk` has written.
        tokenizer: a name on the Hub, a folder that `save_pretrained` has written, or a tokenizer.json file.
        config: which of the data set's configurations.
        data_files: the files of a format: one, a list, or a list for each split.
        column: where the text is.
        train_split: blocks to train on; "train[:90%]" for a part, where the data set is not a saved folder.
        val_split: blocks to validate on.
        test_split: blocks to test on.
        length: tokens in a block.
        batch_size: blocks in a batch.
        **task: the other arguments of `Task`.

    Raises ImportError without `datasets` and `transformers`; ValueError for a split or a column that the data set does
    not have, or a split that is shorter than a block; what `datasets` and `transformers` raise for a name that does not
    exist.
    """

    def __init__(
        self,
        dataset: str,
        tokenizer: str,
        config: str | None = None,
        data_files: str | list[str] | dict[str, str | list[str]] | None = None,
        column: str = "text",
        train_split: str = "train",
        val_split: str = "validation",
        test_split: str = "test",
        length: int = 256,
        batch_size: int = 16,
        **task: Any,
    ):
        super().__init__(batch_size=batch_size, **task)
        require_at_least(1, length=length)
        self.dataset, self.config, self.data_files, self.column = dataset, config, data_files, column
        self.splits = {"train": train_split, "val": val_split, "test": test_split}
        self.length = length
        self.tokenizer = _load_tokenizer(tokenizer)
        require(self.tokenizer.eos_token_id is not None, "tokenizer", "one with an end-of-text token", tokenizer)
        self.vocab_size = len(self.tokenizer)

    def prepare_data(self) -> None:
        _ = self.blocks  # on one process of a machine; the others then find it in the cache

    def draw(self, split: str, index: int) -> Batch:
        blocks = self.blocks[split]
        if split == "train":
            chosen = torch.randint(len(blocks), (self.batch_size,), generator=self.generator(split, index))
        else:
            spread = torch.linspace(0, len(blocks) - 1, self.num_val * self.batch_size, dtype=torch.float64)
            chosen = spread.long()[index * self.batch_size :][: self.batch_size]
        block = blocks[chosen.tolist()]["block"]
        return block[:, :-1], block[:, 1:]

    @cached_property
    def blocks(self) -> "dict[str, Dataset]":
        """A memory-mapped table for each split, with a row of length + 1 tokens for each block."""
        return {split: self._cut(name, self._load(split, name)) for split, name in self.splits.items()}

    def _load(self, split: str, name: str) -> "Dataset":
        from datasets import load_dataset, load_from_disk

        if (Path(self.dataset) / "dataset_dict.json").is_file():
            saved = load_from_disk(self.dataset)
            require(name in saved, f"{split}_split", f"one of {', '.join(saved)}", name)
            return saved[name]
        return load_dataset(self.dataset, self.config, data_files=self.data_files, split=name)

    def _cut(self, name: str, documents: "Dataset") -> "Dataset":
        columns = documents.column_names
        require(self.column in columns, "column", f"one of {', '.join(columns)}", self.column)
        cut = {"tokenizer": self.tokenizer, "column": self.column, "size": self.length + 1}
        blocks = documents.map(_blocks, batched=True, remove_columns=columns, fn_kwargs=cut, desc=f"Tokenizing {name}")
        expected = f"at least one block of length + 1 = {self.length + 1} tokens in the split {name!r}"
        require(len(blocks) > 0, "dataset", expected, self.dataset)
        return blocks.with_format("torch")


def _blocks(
    documents: Mapping[str, list[Any]], tokenizer: "PreTrainedTokenizerBase", column: str, size: int
) -> dict[str, list[list[int]]]:
    texts = tokenizer(documents[column], add_special_tokens=False, return_attention_mask=False, verbose=False)
    stream = [token for tokens in texts["input_ids"] for token in (*tokens, tokenizer.eos_token_id)]
    return {"block": [stream[start : start + size] for start in range(0, len(stream) - size + 1, size)]}


def _load_tokenizer(tokenizer: str) -> "PreTrainedTokenizerBase":
    try:
        import datasets  # noqa: F401  (said now, not when the data are first read)
        from transformers import AutoTokenizer, PreTrainedTokenizerFast
    except ImportError as error:
        raise ImportError(
            "TokenizedText needs datasets and transformers: pip install 'test-time-regression[hf]'"
        ) from error
    if tokenizer.endswith(".json"):
        require(Path(tokenizer).is_file(), "tokenizer", "a file that exists", tokenizer)
        return PreTrainedTokenizerFast(tokenizer_file=tokenizer, eos_token="<|endoftext|>")
    return AutoTokenizer.from_pretrained(tokenizer)
