"""The commands of `ttr` that are not Lightning's, as functions whose parameters are the command's."""

from __future__ import annotations

import argparse
import os
import sys
from argparse import ArgumentError
from collections.abc import Callable
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from jsonargparse import ArgumentParser, DefaultHelpFormatter

from ttr import atlas
from ttr._references import bibtex
from ttr.models import RegressionLM
from ttr.training import Study, export, load_checkpoint, load_exported, run_study

EXAMPLES = {
    "sweep": """examples:
  ttr sweep --config configs/study.yaml                          finished runs are skipped, so this also goes on
  ttr sweep --config configs/study.yaml --retry_failed true
  ttr sweep --config configs/study.yaml --seeds '[0, 1, 2]' --designs '[delta_net, retnet]' --folder runs/three
  ttr sweep --config configs/study.yaml --scheduler tcp://10.0.0.1:8786      on the workers of a Dask cluster
""",
    "atlas": """examples:
  ttr atlas                           the published designs and what they cost
  ttr atlas mesa_net                  one of them: update rule, inputs, cost, citation
""",
    "cite": """example:
  ttr cite gated_delta_net mesa_net > references.bib
""",
    "generate": """examples, of a model that was trained by `ttr fit --config configs/stdlib_text.yaml`:
  ttr generate --ckpt_path runs/stdlib_text/checkpoints/last.ckpt --prompt 'def '
  ttr generate --ckpt_path exported --prompt 'import ' --max_new_tokens 2000 --temperature 0.7 --seed 1
""",
    "export": """examples:
  ttr export --ckpt_path runs/stdlib_text/checkpoints/last.ckpt --folder exported
  ttr export --ckpt_path runs/stdlib_text/checkpoints/last.ckpt --folder exported --transformers true
""",
}


class Formatter(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help whose examples keep their lines."""


def sweep(
    study: Study,
    jobs: int = -1,
    threads: int = 1,
    retry_failed: bool = False,
    scheduler: str | None = None,
) -> None:
    """Train every design on every task; one table of results, to which a sweep that was cut short returns.

    Args:
        study: what to run.
        jobs: processes on this machine; -1 for one a core.
        threads: threads of each process.
        retry_failed: run again what is recorded as failed.
        scheduler: address of a Dask scheduler; its workers then run the study, and must see its folder.
    """
    table = run_study(study, jobs=jobs, threads=threads, retry_failed=retry_failed, scheduler=scheduler)
    statuses = pq.read_table(table, columns=["status"])["status"].to_pylist()
    failed = statuses.count("failed")
    print(f"{table}: {len(statuses) - failed} finished, {failed} failed")


def read_study(path: Path) -> Study:
    """The study of a file that `ttr sweep --config` takes.

    Raises `ValueError` for what is not a study.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Study)
    try:
        values = vars(parser.instantiate_classes(parser.parse_path(path)))
    except ArgumentError as error:
        raise ValueError(f"{path}: {error}") from error
    return Study(**{key.name: values[key.name] for key in fields(Study)})


def show(slug: str | None = None) -> None:
    """Print the published designs, or all about one.

    Args:
        slug: which; a table of all without it.
    """
    if slug is None:
        print(atlas.table())
        return
    row = atlas.row(slug)
    design = row.design
    cost = ", ".join(f"{name} {term}" for name, term in design.cost().as_text().items())
    print(f"{row.publication.name} ({row.publication.year}): {design}")
    for other in row.also:
        print(f"    also {other}")
    print(f"\nupdate rule\n    {design.update_rule()}")
    print("\ninputs beside q, k and v")
    print("\n".join(f"    {name}: {axes}" for name, axes in design.inputs.items()) or "    none")
    print(f"\ncost of one head (T tokens, d channels, f features, C a chunk, n solver steps, w a window)\n    {cost}")
    print(f"\ncitation\n{design.citation()}")


def cite(slugs: list[str]) -> None:
    """Print BibTeX of the works behind published designs, each once.

    Args:
        slugs: which designs.
    """
    print(bibtex(key for slug in slugs for key in atlas[slug].cites()))


def generate(
    ckpt_path: Path,
    prompt: str,
    max_new_tokens: int = 200,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
    device: str = "cpu",
) -> None:
    """Write the prompt and what a trained language model makes of it, as it is sampled.

    Args:
        ckpt_path: a checkpoint of `ttr fit`, or a folder of `ttr export`.
        prompt: how the text begins; token numbers between spaces for a model whose vocabulary is not the 256 bytes.
        max_new_tokens: how many tokens to sample.
        temperature: 0 for the likeliest token each time.
        top_k: sample from the k likeliest only.
        seed: of the sampling.
        device: where the model runs, such as cuda.
    """
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens: expected at least 0, got {max_new_tokens}")
    model = (load_exported if ckpt_path.is_dir() else load_checkpoint)(ckpt_path).to(device)
    if not isinstance(model, RegressionLM):
        raise ValueError(f"ckpt_path: expected a RegressionLM, got a {type(model).__name__} in {str(ckpt_path)!r}")
    vocab_size = model.embedding.num_embeddings
    tokens = _tokens(prompt, vocab_size)
    stream = model.stream(
        torch.tensor([tokens], device=device),
        temperature=temperature,
        top_k=top_k,
        generator=torch.Generator(device).manual_seed(seed),
    )
    out = sys.stdout.buffer
    written: Callable[[int], bytes] = (lambda token: bytes([token])) if vocab_size == 256 else (b"%d ".__mod__)
    for token in tokens:
        out.write(written(token))
    for new in islice(stream, max_new_tokens):
        out.write(written(int(new)))
        out.flush()
    out.write(b"\n")
    out.flush()


def _tokens(prompt: str, vocab_size: int) -> list[int]:
    if vocab_size == 256:
        return list(prompt.encode())
    try:
        tokens = [int(number) for number in prompt.split()]
    except ValueError:
        tokens = [-1]
    if not all(0 <= token < vocab_size for token in tokens):
        raise ValueError(f"prompt: expected numbers from 0 to {vocab_size - 1} between spaces, got {prompt!r}")
    return tokens


def export_model(ckpt_path: Path, folder: Path, transformers: bool = False) -> None:
    """Write a trained model as safetensors and JSON, for `ttr.training.load_exported`.

    Args:
        ckpt_path: a checkpoint of `ttr fit`.
        folder: where the two files go.
        transformers: write them for transformers' AutoModelForCausalLM instead.
    """
    export(ckpt_path, folder, transformers)
    print(folder)


COMMANDS: dict[str, Callable[..., None]] = {
    "sweep": sweep,
    "atlas": show,
    "cite": cite,
    "generate": generate,
    "export": export_model,
}


def _parser(name: str) -> ArgumentParser:
    function = COMMANDS[name]
    description = (function.__doc__ or "").partition("\n")[0]
    parser = ArgumentParser(description=description, epilog=EXAMPLES[name], formatter_class=Formatter)
    if function is sweep:
        parser.add_argument("--config", action="config", help="The study, as YAML.")
        parser.add_class_arguments(Study)
        parser.add_function_arguments(sweep, skip={"study"})
    elif function is show:
        parser.add_argument("slug", nargs="?", help="Which design; a table of all without it.")
    elif function is cite:
        parser.add_argument("slugs", nargs="+", help="Which designs.")
    else:
        parser.add_function_arguments(function)
    return parser


def add_commands(subcommands: Any) -> None:
    """Add the commands to those of another parser."""
    for name in COMMANDS:
        parser = _parser(name)
        subcommands.add_subcommand(name, parser, help=parser.description)


def run_command(parser: ArgumentParser, name: str, config: Any) -> None:
    """Call a command with what was parsed; a user's mistake is one line on standard error, and exit code 2."""
    values = {key: value for key, value in vars(_parser(name).instantiate_classes(config)).items() if key != "config"}
    try:
        if name == "sweep":
            study = {key.name: values.pop(key.name) for key in fields(Study)}
            values["study"] = Study(**study)
        COMMANDS[name](**values)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
