"""Tokenized text: a local data set and tokenizer in the formats of the Hub's, and what a block is."""

import sys

import pytest
import torch

datasets = pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

from ttr.tasks import TokenizedText  # noqa: E402

SENTENCES = ["the memory reads keys", "a value is what a key is bound to", "forgetting tracks switches"]
SIZES = {"train": 400, "validation": 60, "test": 50}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """The cache of `datasets` in a folder of its own, without progress bars."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        datasets.disable_progress_bars()
        yield


@pytest.fixture(scope="module")
def documents():
    """Each split's documents, no two alike."""
    return {
        split: [f"{split} {number} {SENTENCES[number % 3]}" for number in range(size)] for split, size in SIZES.items()
    }


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory, documents):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents["train"], trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, documents):
    path = tmp_path_factory.mktemp("saved")
    splits = {split: datasets.Dataset.from_dict({"text": texts}) for split, texts in documents.items()}
    datasets.DatasetDict(splits).save_to_disk(path)
    return str(path)


def task(folder, tokenizer_file, **arguments):
    sizes = {"length": 16, "batch_size": 8, "num_train": 3, "num_val": 2}
    return TokenizedText(**({"dataset": folder, "tokenizer": tokenizer_file} | sizes | arguments))


def test_the_blocks_are_the_split_with_an_end_behind_every_document(folder, tokenizer_file, documents):
    data = task(folder, tokenizer_file)
    data.prepare_data()
    for split, name in {"train": "train", "val": "validation", "test": "test"}.items():
        tokens = torch.cat([row["block"] for row in data.blocks[split]])
        text = "".join(f"{document}<|endoftext|>" for document in documents[name])
        read = data.tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
        assert text.startswith(read)
        left_out = data.tokenizer(text[len(read) :], add_special_tokens=False)["input_ids"]
        assert len(left_out) <= data.length + 1


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_target_is_the_next_token_of_a_block(folder, tokenizer_file, split):
    data = task(folder, tokenizer_file)
    blocks = {tuple(row["block"].tolist()) for row in data.blocks[split]}
    for tokens, targets in getattr(data, f"{split}_dataloader")():
        assert tokens.dtype == targets.dtype == torch.int64
        assert tokens.shape == targets.shape == (8, 16)
        assert torch.equal(tokens[:, 1:], targets[:, :-1])
        assert 0 <= tokens.min() <= tokens.max() < data.vocab_size
        assert {tuple(row) for row in torch.cat([tokens, targets[:, -1:]], dim=1).tolist()} <= blocks


def test_the_seed_moves_the_training_blocks_only(folder, tokenizer_file):
    one, same, other = (task(folder, tokenizer_file, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.draw("train", 0)[0], same.draw("train", 0)[0])
    assert not torch.equal(one.draw("train", 0)[0], one.draw("train", 1)[0])
    assert not torch.equal(one.draw("train", 0)[0], other.draw("train", 0)[0])
    assert torch.equal(one.draw("val", 0)[0], other.draw("val", 0)[0])


def test_files_of_a_format_and_parts_of_a_split_make_the_same_blocks(folder, tokenizer_file, documents, tmp_path):
    for split, texts in documents.items():
        (tmp_path / f"{split}.txt").write_text("\n".join(texts))
    files = {split: str(tmp_path / f"{split}.txt") for split in documents}
    whole = task(folder, tokenizer_file)
    data = task("text", tokenizer_file, data_files=files, val_split="train[:50%]")
    assert torch.equal(data.draw("train", 0)[0], whole.draw("train", 0)[0])
    assert len(data.blocks["val"]) == pytest.approx(len(whole.blocks["train"]) / 2, rel=0.03)


def test_a_saved_tokenizer_is_the_same_as_its_file(folder, tokenizer_file, tmp_path):
    one = task(folder, tokenizer_file)
    one.tokenizer.save_pretrained(tmp_path)
    two = task(folder, str(tmp_path))
    assert two.vocab_size == one.vocab_size == 320
    assert torch.equal(one.draw("val", 0)[0], two.draw("val", 0)[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"column": "body"}, "column: expected one of text, got 'body'"),
        ({"val_split": "dev"}, "val_split: expected one of train, validation, test, got 'dev'"),
        ({"length": 5000}, "dataset: expected at least one block of length \\+ 1 = 5001 tokens in the split"),
        ({"length": 0}, "length: expected at least 1, got 0"),
        ({"tokenizer": "nowhere/tokenizer.json"}, "tokenizer: expected a file that exists"),
    ],
)
def test_what_cannot_be_read_is_named(folder, tokenizer_file, arguments, message):
    with pytest.raises(ValueError, match=message):
        task(folder, tokenizer_file, **arguments).prepare_data()


def test_without_the_libraries_the_error_says_what_to_install(folder, tokenizer_file, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'test-time-regression\[hf\]'"):
        task(folder, tokenizer_file)
