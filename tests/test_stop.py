"""Ctrl-C and SIGTERM: a whole checkpoint, one line with what continues the run, and no torn files. Real signals."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import TrainerCallback

from ccssl_hf.callbacks import StopOnSignal
from ccssl_hf.data.images import UnreadableImageError
from ccssl_hf.resume import checkpoints, is_complete, last_checkpoint
from ccssl_hf.training_args import CCSSLTrainingArguments
from tiny_runs import CCSSLTrainer, different, everything, model_of, trainer_of

ROOT = Path(__file__).resolve().parents[1]
TIMES = re.compile(r"runtime|per_second|preparation_time")
STOPS = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: SystemExit}


class Signal(TrainerCallback):
    """Sends this process a signal at the end of a step, or after a batch of the evaluation that follows it."""

    def __init__(self, step: int, number: int = signal.SIGINT, *, in_evaluation: bool = False) -> None:
        self.step, self.number, self.in_evaluation, self.batches = step, number, in_evaluation, 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step and not self.in_evaluation:
            os.kill(os.getpid(), self.number)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.batches += state.global_step == self.step
        if self.batches == 1 and self.in_evaluation:
            os.kill(os.getpid(), self.number)


def stopped(trainer: CCSSLTrainer, number: int = signal.SIGINT) -> BaseException:
    with pytest.raises(STOPS[number]) as end:
        trainer.train()
    return end.value


def history(trainer: CCSSLTrainer) -> list[dict[str, Any]]:
    """All that was logged, without times."""
    return [{k: v for k, v in entry.items() if not TIMES.search(k)} for entry in trainer.state.log_history]


def assert_same(one: CCSSLTrainer, other: CCSSLTrainer) -> None:
    assert different(everything(one), everything(other)) == []
    assert history(one) == history(other)


@pytest.mark.parametrize("number", STOPS, ids=["Ctrl-C", "SIGTERM"])
def test_a_signal_saves_a_checkpoint_and_the_resumed_run_is_the_uninterrupted_one(
    tmp_path: Path, number: int, caplog: pytest.LogCaptureFixture, fault_record: Callable[..., None]
) -> None:
    """Also with save_strategy="no", and between two logs."""
    changes: dict[str, Any] = {"logging_steps": 4, "dataloader_num_workers": 2 if number == signal.SIGINT else 0}
    before = signal.getsignal(number)
    trainer = trainer_of(tmp_path / "run", callbacks=[Signal(3, number)], **changes)
    end = stopped(trainer, number)
    said = f"Stopped after 3 of 6 steps, saved in {tmp_path}/run/checkpoint-3. Continue with: trainer.train(resume"
    assert caplog.text.count(said) == 1
    assert str(end).startswith(said) if number == signal.SIGINT else end.code == 143  # type: ignore[attr-defined]
    assert signal.getsignal(number) is before
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-3"]
    assert is_complete(tmp_path / "run" / "checkpoint-3")

    whole = trainer_of(tmp_path / "whole", **changes)
    output = whole.train()
    resumed = trainer_of(tmp_path / "run", model_of(seed=1), **changes)
    assert resumed.train(resume_from_checkpoint=True).training_loss == output.training_loss
    assert_same(whole, resumed)
    name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
    fault_record(f"{name} during a step", "whole checkpoint; the resumed run has the same bits and logs", "0 steps")


def test_a_signal_during_an_evaluation_ends_it_and_the_resumed_run_repeats_it(
    tmp_path: Path, fault_record: Callable[..., None]
) -> None:
    """The best model is that of the uninterrupted run, and the last checkpoint stays although only one is kept."""
    changes: dict[str, Any] = {
        **{"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 4, "save_strategy": "best"},
        **{"load_best_model_at_end": True, "metric_for_best_model": "top1", "greater_is_better": True},
        **{"save_total_limit": 1},
    }
    signals = Signal(4, in_evaluation=True)
    trainer = trainer_of(tmp_path / "run", callbacks=[signals], **changes)
    stopped(trainer)
    assert signals.batches == 1  # of ten
    assert trainer.model.training
    assert not any(entry["step"] == 4 and "eval_top1" in entry for entry in trainer.state.log_history)
    assert last_checkpoint(tmp_path / "run") == str(tmp_path / "run" / "checkpoint-4")

    resumed = trainer_of(tmp_path / "run", model_of(seed=1), **changes)
    resumed.train(resume_from_checkpoint=True)
    whole = trainer_of(tmp_path / "whole", **changes)
    whole.train()
    assert_same(whole, resumed)
    assert whole.provenance == resumed.provenance and resumed.state.best_global_step == whole.state.best_global_step
    fault_record("Ctrl-C during an evaluation", "evaluation stopped, whole checkpoint, evaluation repeated", "0 steps")


class Decoding(CCSSLTrainer):
    """Gets a signal while it prepares its data."""

    def get_train_dataloader(self) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
        raise AssertionError("the signal came late")


def test_before_the_first_step_there_is_nothing_to_save(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = trainer_of(tmp_path)
    trainer = Decoding(model.model, model.args, model.train_dataset, model.unlabeled_dataset)
    assert str(stopped(trainer)) == "Stopped before the first step: there is nothing to save."
    assert caplog.text.count("nothing to save") == 1 and list(tmp_path.iterdir()) == []


def test_a_signal_after_the_last_step_keeps_the_result(tmp_path: Path) -> None:
    class AtTheEnd(TrainerCallback):
        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            os.kill(os.getpid(), signal.SIGINT)

    trainer = trainer_of(tmp_path, callbacks=[AtTheEnd()])
    assert str(stopped(trainer)).startswith("Stopped after 6 of 6 steps, saved in ")
    resumed = trainer_of(tmp_path, model_of(seed=1))
    resumed.train(resume_from_checkpoint=True)
    assert different(everything(trainer), everything(resumed)) == []


class WhileSaving(CCSSLTrainer):
    """Gets a second signal while it saves, `later` seconds after the first as far as the run knows."""

    later = 0.0

    def _save_rng_state(self, output_dir: str) -> None:
        if self.state.global_step == 4:
            self.stop._first -= self.later
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
        super()._save_rng_state(output_dir)


@pytest.mark.parametrize("later", [0.0, 2.0], ids=["at_once", "by_hand"])
def test_a_second_ctrl_c_aborts_unless_a_launcher_sent_it_twice(
    tmp_path: Path, later: float, fault_record: Callable[..., None]
) -> None:
    model = trainer_of(tmp_path, save_strategy="steps", save_steps=3)
    trainer = WhileSaving(model.model, model.args, model.train_dataset, model.unlabeled_dataset, callbacks=[Signal(4)])
    trainer.later = later
    assert ("Aborted" in str(stopped(trainer))) == (later > StopOnSignal.AGAIN)
    last = tmp_path / ("checkpoint-3" if later else "checkpoint-4")
    assert last_checkpoint(tmp_path) == str(last)
    assert checkpoints(tmp_path)[0].name == "checkpoint-4"
    if later:
        fault_record("A second Ctrl-C while a checkpoint is saved", "aborted; resumes from the one before", "1 step")


# -------------------------------------------------------------------------------------------------------------- workers


def test_only_the_training_process_ends_its_workers_with_sigterm(tmp_path: Path) -> None:
    """A scheduler signals all processes of a run; the step that follows needs the workers."""
    trainer = trainer_of(tmp_path, dataloader_num_workers=2)
    before, batches = psutil.Process().children(), iter(trainer.get_train_dataloader())
    next(batches)
    workers = [child for child in psutil.Process().children() if child not in before]
    pids = [str(worker.pid) for worker in workers]
    assert len(pids) == 2
    subprocess.run(["kill", "-TERM", *pids], check=True)
    subprocess.run(["kill", "-INT", *pids], check=True)
    for _ in range(3):
        next(batches)
    assert all(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers)
    for worker in workers:
        worker.terminate()
    assert not psutil.wait_procs(workers, timeout=30)[1]


class Unreadable(torch.utils.data.Dataset[int]):
    """Its worker raises an error of two lines."""

    def __getitem__(self, row: int) -> int:
        raise UnreadableImageError("Image 3 can't be decoded:\n  3.png") from OSError("truncated")


def test_an_error_of_a_worker_has_its_own_message_alone() -> None:
    with pytest.raises(UnreadableImageError) as error:
        next(iter(torch.utils.data.DataLoader(Unreadable(), sampler=[3], num_workers=1)))
    assert str(error.value) == "Image 3 can't be decoded:\n  3.png"


# --------------------------------------------------------------------------------------------------- in other processes

PROGRAM = """
    import sys
    from pathlib import Path
    from tiny_runs import TrainerCallback, VALIDATION, trainer_of
    from ccssl_hf import recipe
    from ccssl_hf.errors import errors_in_one_line

    class Tell(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            Path(args.output_dir, f"step-{args.process_index}").write_text(str(state.global_step))
            if "fail" in sys.argv:
                raise RuntimeError("of a test")

    if __name__ == "__main__":
        with errors_in_one_line():
            more = dict(word.split("=") for word in sys.argv[2:] if "=" in word and not word.startswith("--"))
            more = {name: int(value) for name, value in more.items()}
            resume = "true" if "--resume_from_checkpoint" in sys.argv else None
            settings = {"max_steps": 2000, "logging_steps": 500, "resume_from_checkpoint": resume, **more}
            trainer = trainer_of(Path(sys.argv[1]), callbacks=[Tell()], **settings)
        recipe.train(trainer, {})
"""


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(autouse=True)
def _heeds_ctrl_c() -> Iterator[None]:
    """A test run in the background ignores Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """`_start`; at the end of the test no process that it has started may be alive."""
    yield _start
    alive = psutil.wait_procs(processes_of(tmp_path), timeout=30)[1]
    for process in alive:
        process.kill()
    assert not alive


def processes_of(folder: Path) -> list[psutil.Process]:
    """The processes alive with this folder in their command line: launchers, runs and their workers."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if str(folder) in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _start(words: list[str], folder: Path, *more: str) -> subprocess.Popen[str]:
    """Starts the program, in a process group of its own, and waits until it trains."""
    program = folder.parent / "program.py"
    program.write_text(textwrap.dedent(PROGRAM))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    process = subprocess.Popen(
        [*words, str(program), str(folder), *more],
        **{"cwd": ROOT, "env": env, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT},
        start_new_session=True,
        # A test run in the background ignores Ctrl-C, and so would its processes.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not (folder / "step-0").exists() and process.poll() is None:
        time.sleep(0.02)
    return process


def assert_stopped(folder: Path, output: str, *command: str) -> Path:
    """Checks that one line names the steps, the checkpoint and the command, and returns the whole checkpoint."""
    [line] = [line for line in output.splitlines() if line.startswith("Stopped after ")]
    [(step, saved, continued)] = re.findall(
        r"^Stopped after (\d+) of 2000 steps, saved in (.*)\. Continue with: (.*)$", line
    )
    assert saved == f"{folder}/checkpoint-{step}" and is_complete(saved)
    words = shlex.split(continued)
    assert words[-2:] == ["--resume_from_checkpoint", "true"] and all(word in words for word in command)
    return Path(saved)


@pytest.mark.slow
def test_ctrl_c_in_a_terminal_reaches_training_and_its_workers(
    tmp_path: Path, start: Start, fault_record: Callable[..., None]
) -> None:
    """A terminal sends the signal to all processes of the group."""
    process = start([sys.executable], tmp_path / "run", "dataloader_num_workers=2")
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert_stopped(tmp_path / "run", output, "dataloader_num_workers=2")
    assert "Traceback" not in output and "Error" not in output
    assert [line.split()[0] for line in output.splitlines() if line.startswith("Stop")] == ["Stopping:", "Stopped"]
    fault_record("Ctrl-C with worker processes", "whole checkpoint, exit code 130, no traceback", "0 steps")


@pytest.mark.slow
@pytest.mark.parametrize("end", ["An error", "SIGKILL"])
def test_no_worker_outlives_a_run(tmp_path: Path, start: Start, end: str, fault_record: Callable[..., None]) -> None:
    process = start(
        [sys.executable], tmp_path / "run", "dataloader_num_workers=2", *(["fail"] if end != "SIGKILL" else [])
    )
    if end == "SIGKILL":
        assert len(processes_of(tmp_path)) == 3
        process.kill()
    output, _ = process.communicate(timeout=60)  # until the last worker has closed its end
    assert process.returncode == (-signal.SIGKILL if end == "SIGKILL" else 1)
    assert ("RuntimeError: of a test" in output) == (end != "SIGKILL")
    assert not psutil.wait_procs(processes_of(tmp_path), timeout=30)[1]
    fault_record(f"{end} with worker processes", "no process is left behind", "steps since the last checkpoint")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "number"),
    [("one", signal.SIGINT), ("one", signal.SIGTERM), ("two", signal.SIGINT), ("torchrun", signal.SIGTERM)],
)
def test_a_signal_to_a_launcher_stops_all_processes_with_a_checkpoint(
    tmp_path: Path, start: Start, launcher: str, number: int, fault_record: Callable[..., None]
) -> None:
    configs = {"one": "single_process", "two": "two_cpu_processes"}
    words = ["-m", "accelerate.commands.launch", "--config_file"]
    words += [f"recipes/accelerate_configs/{configs.get(launcher)}.yaml", "--main_process_port", "0"]
    if launcher == "torchrun":
        words = ["-m", "torch.distributed.run", "--standalone", "--local_addr", "localhost", "--nproc_per_node", "2"]
    process = start([sys.executable, *words], tmp_path / "run")
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)  # Ctrl-C, and a scheduler
    output, _ = process.communicate(timeout=100)  # until the last process has closed its end
    checkpoint = assert_stopped(tmp_path / "run", output, *words[:2])
    steps = {path.read_text() for path in (tmp_path / "run").glob("step-*")}
    assert steps == {checkpoint.name.removeprefix("checkpoint-")}
    assert len(list((tmp_path / "run").glob("step-*"))) == (1 if launcher == "one" else 2)
    names = {"one": "accelerate launch, one process", "two": "accelerate launch, two processes"}
    name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
    fault_record(f"{name} to {names.get(launcher, 'torchrun, two processes')}", "whole checkpoint", "0 steps")


@pytest.mark.slow
def test_the_command_that_is_printed_continues_the_run(tmp_path: Path, start: Start) -> None:
    process = start([sys.executable], tmp_path / "run")
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143, output
    checkpoint = assert_stopped(tmp_path / "run", output)
    command = shlex.split(output.rpartition("Continue with: ")[2])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    again = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while (tmp_path / "run" / "step-0").read_text() == checkpoint.name.removeprefix("checkpoint-"):
        assert again.poll() is None
        time.sleep(0.02)
    again.send_signal(signal.SIGINT)
    output, _ = again.communicate(timeout=60)
    assert again.returncode == 130, output
    later = assert_stopped(tmp_path / "run", output)
    assert int(later.name.rpartition("-")[2]) > int(checkpoint.name.rpartition("-")[2])


def test_no_argument_asks_for_another_handler_of_signals(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="enable_jit_checkpoint=True has no effect: a run that is told to stop saves"):
        CCSSLTrainingArguments(output_dir=str(tmp_path), use_cpu=True, enable_jit_checkpoint=True)
