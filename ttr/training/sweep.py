"""Sweeps: design × task × learning rate × seed, each run a process's work, and one table of what came out."""

from __future__ import annotations

import contextlib
import logging
import platform
import threading
import time
import traceback
import warnings
from argparse import ArgumentError
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import joblib
import lightning
import torch
from joblib.externals.loky.process_executor import TerminatedWorkerError
from tqdm import tqdm

import ttr
from ttr.training.results import Results
from ttr.training.run import TrainingRun
from ttr.training.study import Run, Study

# Two runs in the threads of one process (a Dask worker may have several) would share its random numbers.
_ONE_AT_A_TIME = threading.Lock()


def check(study: Study) -> None:
    """Build the model and the data of every task with every design, and train nothing.

    Raises `ValueError` that names the task and the design, for an argument that a class does not have, a value that it
    does not take, or sizes that do not fit.
    """
    pairs = {(run.task, run.design): run for run in reversed(study.runs())}
    # Every name stands in one of the first of these: a typo need not wait for the rest.
    tasks, designs = (list(dict.fromkeys(names)) for names in zip(*reversed(pairs), strict=True))
    first = [pair for pair in reversed(pairs) if pair[0] == tasks[0] or pair[1] == designs[0]]
    with _quiet():
        for pair in dict.fromkeys([*first, *reversed(pairs)]):
            try:
                _built(pairs[pair].config)
            except (ArgumentError, ValueError) as error:
                raise ValueError(f"task {pair[0]!r}, design {pair[1]!r}: {' '.join(str(error).split())}") from error


def run_study(
    study: Study,
    *,
    jobs: int = -1,
    threads: int = 1,
    retry_failed: bool = False,
    scheduler: str | None = None,
    progress: bool = True,
) -> Path:
    """Run what the study's folder has no result of, and write the table of all results there.

    A run that raises is recorded with its traceback, and so is one whose process dies; the others go on. A run is
    recorded where it ran, as soon as it is over, so that a sweep that is killed loses only what was under way.

    Args:
        study: the runs, and the folder of their results.
        jobs: processes on this machine; −1 for one a core.
        threads: of each process.
        retry_failed: whether runs that are recorded as failed run again.
        scheduler: address of a Dask scheduler, whose workers then take the place of local processes.
        progress: whether a bar on standard error counts the runs.

    Returns the path of the table.

    Raises `ValueError` for a study that `check` refuses, `OSError` where the folder cannot be written.
    """
    results = Results(study.folder)
    results.prepare()
    check(study)
    done = results.read()
    runs = {run.hash: run for run in study.runs()}
    todo = [run for key, run in runs.items() if key not in done or (retry_failed and done[key]["status"] == "failed")]
    records = _on_dask(todo, results, threads, scheduler) if scheduler else _local(todo, results, jobs, threads)
    try:
        for record in tqdm(records, total=len(runs), initial=len(runs) - len(todo), unit="run", disable=not progress):
            if record["hash"] not in results:  # a worker with another file system could not leave it here
                results.write(record)
    except OSError:
        raise
    except BaseException:
        results.assemble()
        raise
    return results.assemble()


def perform(run: Run, results: Results, threads: int = 1) -> dict[str, Any]:
    """Train and test one configuration; the record of it, which is also written.

    What the run raises is part of the record. Raises `OSError` where the record cannot be written.
    """
    with _ONE_AT_A_TIME, results.started(run.hash):
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)  # what a run before this one may have asked for
        begin = time.time()
        try:
            outcome = _train(run.config) | {"status": "finished"}
        except Exception:
            outcome = {"traceback": traceback.format_exc()}
        record = _record(run) | outcome | {"started": begin, "seconds": time.time() - begin}
        results.write(record)
    return record


def _record(run: Run, error: str | None = None) -> dict[str, Any]:
    """The record of a run that has not finished."""
    return {
        "hash": run.hash,
        **{"design": run.design, "task": run.task, "learning_rate": run.learning_rate, "seed": run.seed},
        **{"status": "failed", "traceback": error, "metrics": {}, "steps": None, "device": None},
        **{"seconds": None, "started": None, "config": run.config, "versions": _versions()},
    }


def _train(config: dict[str, Any]) -> dict[str, Any]:
    with _quiet():
        built = _built(config)
        trainer = built.trainer
        trainer.fit(built.model, built.datamodule)
        numbers = {name: float(value) for name, value in trainer.callback_metrics.items()}
        steps = trainer.global_step
        numbers |= trainer.test(built.model, built.datamodule, verbose=False)[0]
    device = trainer.strategy.root_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {"metrics": numbers, "steps": steps, "device": f"{device.type} {name}"}


def _built(config: dict[str, Any]) -> TrainingRun:
    """Without checkpoints, logs and bars, unless the configuration asks for them."""
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = dict.fromkeys(quiet, False) | {"devices": 1} | config.get("trainer", {})
    return TrainingRun(
        args=config | {"trainer": trainer},
        run=False,
        save_config_callback=None,
        parser_kwargs={"exit_on_error": False},
    )


def _local(todo: Sequence[Run], results: Results, jobs: int, threads: int) -> Iterator[dict[str, Any]]:
    """The records as they come in.

    A process that dies takes its neighbours with it. Those that were under way then run again, each with no neighbour,
    and what dies alone is recorded as failed.
    """

    def parallel(runs: Sequence[Run], processes: int) -> Iterator[dict[str, Any]]:
        with joblib.parallel_config("loky", n_jobs=processes, inner_max_num_threads=threads):
            yield from _parallel(runs, results, threads)

    left, begin = {run.hash: run for run in todo}, time.time()
    while left:
        results.forget_started()
        try:
            for record in parallel([*left.values()], jobs):
                del left[record["hash"]]
                yield record
        except TerminatedWorkerError:
            known, under_way = results.read(), results.under_way()
            for key, run in [*left.items()]:
                if key in known and (known[key]["started"] or 0) >= begin:
                    yield known[key]
                elif key in under_way:
                    try:
                        yield from parallel([run], 2)
                    except TerminatedWorkerError as error:
                        results.write(died := _record(run, str(error)))
                        yield died
                else:
                    continue
                del left[key]


def _on_dask(todo: Sequence[Run], results: Results, threads: int, scheduler: str) -> Iterator[dict[str, Any]]:
    try:
        from distributed import Client
    except ImportError as error:
        raise ValueError("scheduler: expected the extra dask to be installed: pip install distributed") from error
    with Client(scheduler, set_as_default=True), joblib.parallel_config("dask"):
        yield from _parallel(todo, results, threads)


def _parallel(runs: Sequence[Run], results: Results, threads: int) -> Iterator[dict[str, Any]]:
    calls = (joblib.delayed(perform)(run, results, threads) for run in runs)
    yield from joblib.Parallel(return_as="generator_unordered", batch_size=1)(calls)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hundreds of runs say the same hundreds of times; what goes wrong is in their records."""
    loggers = [logging.getLogger(f"lightning.{package}") for package in ("pytorch", "fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _versions() -> dict[str, str]:
    versions = {"ttr": ttr.__version__, "torch": torch.__version__, "lightning": lightning.__version__}
    return {name: str(version) for name, version in versions.items()} | {"python": platform.python_version()}
