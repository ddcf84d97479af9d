"""`CCSSLTrainer`: a `transformers.Trainer` for one algorithm, two splits and up to three views.

The file is long because the hooks of `transformers.Trainer` are methods of one class. Other modules do the work.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import nullcontext
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import CommitInfo, run_as_future
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import EvalPrediction, Trainer, TrainerCallback, set_seed
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_utils import HubStrategy

from . import data, resume
from .algorithms import Algorithm, build_algorithm
from .callbacks import (
    EvaluationStopped,
    FiniteGuard,
    RunEstimate,
    StepMonitor,
    StopOnSignal,
    UnreadableImages,
    end_with_parent,
    progress_callback,
)
from .card import write_card
from .data.survey import RunSurvey, Survey, size_errors
from .distributed import copy_from_main_process, on_main_process, synchronize_batchnorm
from .ema import UpdateAverage, WeightAverage, published_weights
from .hub import plan_push, upload, upload_checkpoint
from .metrics import check_best_metric, check_outputs
from .metrics import compute_metrics as default_metrics
from .modeling import CCSSLForImageClassification
from .optimization import cosine_7_16_schedule, decayed_parameter_names
from .output_folder import check_writable, one_run_in
from .record import METRICS, Provenance, Result, RunRecord, Split, SplitPredictions, library_versions
from .sampling import PairedBatchSampler
from .step import forward_views, make_views
from .training_args import CCSSLTrainingArguments
from .transforms import MAX_SIDE_HELD

logger = logging.getLogger(__name__)


class CCSSLTrainer(Trainer):
    """Trains a `CCSSLForImageClassification` on a labeled and an unlabeled split.

    Training, evaluation, callbacks, resuming, DDP through accelerate and pushes work as in `transformers.Trainer`.
    Evaluation, saving and publishing use the averaged weights (see `args.eval_weights`). A TypeError or ValueError is
    raised before any work is done if an argument has the wrong class, or the data do not fit the arguments.

    Args:
        train_dataset: Labeled images.
        unlabeled_dataset: Unlabeled images. None is allowed only if the algorithm uses none.
        eval_dataset: Labeled images, or a dictionary of such splits. Images with the label -1, or with a name that is
            not a class of the model, count as out-of-distribution.
        compute_metrics: Default: `ccssl_hf.metrics.compute_metrics`. This and all others as in `transformers.Trainer`.
    """

    args: CCSSLTrainingArguments
    eval_dataset: Any

    def __init__(
        self,
        model: CCSSLForImageClassification,
        args: CCSSLTrainingArguments,
        train_dataset: datasets.Dataset,
        unlabeled_dataset: datasets.Dataset | None = None,
        eval_dataset: datasets.Dataset | dict[str, datasets.Dataset] | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        if not isinstance(args, CCSSLTrainingArguments):
            raise TypeError(f"args is a {type(args).__name__}: pass ccssl_hf.CCSSLTrainingArguments.")
        if not isinstance(model, CCSSLForImageClassification):
            raise TypeError(f"model is a {type(model).__name__}: build one with CCSSLForImageClassification.from_timm.")
        self.args, self.class_names = args, model.config.labels
        self.settings = args.view_settings(model.backbone.pretrained_cfg)
        auto: Literal["stream", "memory"] = "stream" if self.settings.image_size > MAX_SIDE_HELD else "memory"
        self.decode = auto if args.decode == "auto" else args.decode
        if self.decode == "stream" and self.settings.weak_crop == "pad":
            raise ValueError("weak_crop='pad' needs images at the training size: set weak_crop='resized' to stream.")
        self.train_dataset, self.unlabeled_dataset, self.eval_dataset = train_dataset, unlabeled_dataset, eval_dataset
        self._read_data()
        self.algorithm = self._build_algorithm(model)
        if args.metric_for_best_model and args.eval_strategy != "no" and compute_metrics is None and self._has_ood:
            own = type(self.algorithm).open_set_score is not Algorithm.open_set_score
            check_best_metric(args.metric_for_best_model, self._has_ood, open_set=own)
        check_writable(args.output_dir)

        # Freeze parameters that receive no gradient; DDP would wait for them.
        model.projection.requires_grad_(self.algorithm.needs_embeddings)
        for name, head in model.heads.items():
            head.requires_grad_(name in self.algorithm.heads)
        if args.device.type != "cpu":
            # On a CPU the fused SGD takes 4x as long on such weights, and channels_last images alone are as fast.
            model.to(memory_format=torch.channels_last)
        if args.sync_batchnorm:
            synchronize_batchnorm(model, args.device)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            compute_metrics=compute_metrics or default_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        if args.n_gpu > 1:  # DataParallel would split the pairs of a batch
            raise ValueError(
                f"One process sees {args.n_gpu} GPUs: use `accelerate launch`, or set CUDA_VISIBLE_DEVICES to one GPU."
            )
        self.loss_is_scaled_for_ga = False  # compute_loss returns the mean of one batch
        self.algorithm.to(args.device)
        self.model.to(args.device)  # upstream delays this under bf16_full_eval, but the EMA starts as a copy
        copy_from_main_process(self.model)  # DDP copies too late for the EMA
        self.ema = WeightAverage(self.model, args.ema_decay) if args.ema_decay else None
        self.monitor = StepMonitor(self.class_names, skips=args.on_nonfinite == "skip")
        self.unreadable = UnreadableImages(unlabeled_dataset, args.image_column)
        # For the record: the last evaluation of each split, and names that the trainer cannot know.
        self.results: dict[str, list[Result]] = {}
        self.predictions: dict[str, SplitPredictions] = {}
        self.evaluated: dict[str, datasets.Dataset] = {}
        self.survey = RunSurvey(
            {"labeled": train_dataset, "unlabeled": unlabeled_dataset},
            self.class_names,
            show=args.get_process_log_level() <= logging.WARNING,
            image_column=args.image_column,
            label_column=args.label_column,
            hidden_label_column=args.hidden_label_column,
            image_size=self.settings.image_size,
            max_pixels=args.max_image_pixels,
            skip_bad=args.on_bad_image == "skip",
        )
        self.dataset_names: dict[str, str] = {}
        self.base_model: str | None = None
        self._best_step: int | None = None
        self.given_optimizer = _names(*optimizers, *(optimizer_cls_and_kwargs or ()))
        self.stop = StopOnSignal(self)
        self.add_callback(self.stop)
        self._pushes: list[Future[CommitInfo]] = []  # uploads of checkpoints
        self.guard = FiniteGuard(self)
        self.add_callback(self.guard)
        if self.ema is not None:
            self.add_callback(UpdateAverage(self.ema))
        self.add_callback(RunEstimate(unlabeled_views=len(self.algorithm.views)))
        if not args.disable_tqdm:
            self.remove_callback(DEFAULT_PROGRESS_CALLBACK)
            self.add_callback(progress_callback())

    def _read_data(self) -> None:
        """Check all splits, and read the labels of the training splits."""
        args, unlabeled, evaluation = self.args, self.unlabeled_dataset, self.eval_dataset
        batch = args.per_device_train_batch_size * args.world_size
        self.labels, self.hidden_labels = self._read_labels(self.train_dataset, "labeled"), None
        if unlabeled is not None:
            data.check_images(unlabeled, role="unlabeled", image_column=args.image_column)
        sizes = {"batch": batch, "mu": args.mu, "repeat_labeled": args.repeat_labeled}
        for error in size_errors(len(self.labels), None if unlabeled is None else len(unlabeled), **sizes):
            raise ValueError(error)
        if unlabeled is not None and args.hidden_label_column is not None:
            self.hidden_labels = self._read_labels(unlabeled, "unlabeled", args.hidden_label_column)
        self._has_ood: dict[str, bool] = {}
        for name, split in (evaluation if isinstance(evaluation, dict) else {"": evaluation}).items():
            if split is not None:
                labels = self._read_labels(split, name or "evaluation")
                self._has_ood[name] = bool((labels == data.OUT_OF_DISTRIBUTION).any())

    def check_data(self, further: Mapping[str, datasets.Dataset] | None = None) -> Survey:
        """Look at all splits, print what they hold, and return it. `train` does so before the first step.

        Call it in every process. `further` are splits that are evaluated later, by name. Images of the labeled and the
        evaluation splits are decoded, once: the next run on the same files does not repeat it.

        Raises:
            ValueError: Labeled or evaluation images can't be read. It names them all.
        """
        own = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"validation": self.eval_dataset}
        evaluation = {**own, **(further or {})}
        return self.survey.of_all({name: split for name, split in evaluation.items() if split is not None})

    def _read_labels(self, split: datasets.Dataset, role: str, column: str | None = None) -> np.ndarray:
        data.check_images(split, role=role, image_column=self.args.image_column)
        column, allow_ood = column or self.args.label_column, split is not self.train_dataset
        return data.read_labels(split, column, self.class_names, role=role, allow_ood=allow_ood)

    def _build_algorithm(self, model: CCSSLForImageClassification) -> Algorithm:
        args, unlabeled = self.args, self.unlabeled_dataset
        algorithm = build_algorithm(
            args.algorithm,
            num_classes=len(self.class_names),
            num_unlabeled=len(unlabeled or ()),  # None is an error below
            embedding_dim=model.config.projection_dim,
            batch_size=args.per_device_train_batch_size * args.world_size,
            mu=args.mu,
            **args.hyperparameters(),
        )
        model.add_heads({name: make(model.feature_dim) for name, make in algorithm.heads.items()})
        if algorithm.views and unlabeled is None:
            raise ValueError(
                f"Algorithm {args.algorithm!r} with these settings needs unlabeled images: pass unlabeled_dataset, or "
                "set algorithm='supervised' and lambda_contrast=0."
            )
        if not algorithm.views and unlabeled is not None:
            logger.warning("Algorithm %r uses no unlabeled images: unlabeled_dataset is ignored.", args.algorithm)
        return algorithm

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Decayed parameters by module type. Upstream goes by name, and does not know timm's `bn1` and `norm1`."""
        return decayed_parameter_names(model)

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> tuple[Any, Any]:
        if args.optim == "sgd":
            kwargs = {"lr": args.learning_rate, "momentum": args.sgd_momentum, "nesterov": args.nesterov, "fused": True}
            return torch.optim.SGD, kwargs
        return Trainer.get_optimizer_cls_and_kwargs(args, model)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        if self.args.schedule == "lr_scheduler_type" or self.lr_scheduler is not None:  # type: ignore[has-type]
            return super().create_scheduler(num_training_steps, optimizer)
        steps = {"warmup_steps": self.args.get_warmup_steps(num_training_steps), "total_steps": num_training_steps}
        self.lr_scheduler = cosine_7_16_schedule(optimizer or self.optimizer, **steps)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def get_train_dataloader(self) -> DataLoader:
        """Batches of both splits in one long epoch: the sampler handles the epochs of each split."""
        args, views = self.args, self.algorithm.views
        unlabeled = self.unlabeled_dataset if views else None
        with args.main_process_first(desc="decoding images"):
            dataset = data.PairedDataset(
                self.train_dataset,
                self.labels,
                unlabeled,
                hidden_labels=self.hidden_labels,
                image_column=args.image_column,
                views=views,
                settings=self.settings,
                seed=args.seed,
                decode=self.decode,
                max_pixels=args.max_image_pixels,
                on_bad_image=args.on_bad_image,
            )
        self.unreadable.check(dict(dataset.unreadable))
        self.unreadable.add(dataset.unreadable)
        sampler = PairedBatchSampler(
            num_labeled=len(self.train_dataset),
            num_unlabeled=len(unlabeled or ()),
            batch_size=args.per_device_train_batch_size,
            mu=args.mu,
            num_batches=args.max_steps * args.gradient_accumulation_steps * args.world_size,
            seed=args.seed,
        )
        return self._loader(dataset, decodes=self.decode == "stream", batch_sampler=sampler, collate_fn=dict)

    def _loader(self, dataset: Any, *, decodes: bool, **settings: Any) -> DataLoader:
        """`decodes`: whether the dataset decodes images."""
        args, workers = self.args, self.args.dataloader_num_workers
        if workers == -1:
            workers = data.default_workers(args.device) if decodes else 0
        loader = DataLoader(
            dataset,
            num_workers=workers,
            pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
            persistent_workers=args.dataloader_persistent_workers and workers > 0,
            prefetch_factor=args.dataloader_prefetch_factor if workers else None,
            multiprocessing_context=args.dataloader_multiprocessing_context if workers else None,
            worker_init_fn=end_with_parent,
            **settings,
        )
        return self.accelerator.prepare(loader)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        name, split = "evaluation", self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(split, str):
            name, split = split, self.eval_dataset[split]
        if split is None:
            raise ValueError("There is no evaluation split: pass eval_dataset to CCSSLTrainer or to evaluate().")
        return self._evaluation_loader(split, self._read_labels(split, name), name)

    def get_test_dataloader(self, test_dataset: datasets.Dataset) -> DataLoader:
        data.check_images(test_dataset, role="test", image_column=self.args.image_column)
        has_labels = self.args.label_column in test_dataset.column_names
        labels = self._read_labels(test_dataset, "test") if has_labels else None
        if labels is not None and (labels == data.OUT_OF_DISTRIBUTION).all():
            labels = None  # the split withholds its labels
        self.survey.of_new("test", test_dataset, label_column=self.args.label_column if has_labels else None)
        return self._evaluation_loader(test_dataset, labels, "test")

    def _evaluation_loader(self, split: datasets.Dataset, labels: np.ndarray | None, role: str) -> DataLoader:
        transform = create_transform(**resolve_data_config(pretrained_cfg=self.model.backbone.pretrained_cfg))
        column = self.args.image_column
        where: dict[str, Any] = {"image_column": column, "role": role, "max_pixels": self.args.max_image_pixels}
        dataset = data.EvaluationDataset(split, labels, transform=transform, **where)
        own = torch.Generator()  # else an evaluation changes the random numbers of dropout in training
        return self._loader(dataset, decodes=True, batch_size=self.args.per_device_eval_batch_size, generator=own)

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The algorithm's loss in training; cross-entropy over in-distribution images in evaluation."""
        algorithm, args = self.algorithm, self.args
        if "labeled_images" in inputs:
            streamed, with_embeddings = self.decode == "stream", algorithm.needs_embeddings
            views = make_views(inputs, algorithm.views, self.settings, seed=args.seed, cropped=streamed)
            batch = forward_views(model, views, inputs, with_embeddings=with_embeddings, weak_forward=args.weak_forward)
            result = algorithm(batch)
            self.monitor.add(result, inputs.get("hidden_labels"))
            self.unreadable.add(inputs.get("unreadable", ()))
            return self.guard.add(result, batch, inputs)
        images, labels = inputs["pixel_values"].to(self.model.dtype), inputs["labels"]  # half with bf16_full_eval
        output = model(pixel_values=images)
        logits = output.logits.float()
        loss = F.cross_entropy(logits, labels, ignore_index=data.OUT_OF_DISTRIBUTION, reduction="sum")
        # A batch of OOD images only must not turn the split's mean into NaN.
        loss = loss / (labels != data.OUT_OF_DISTRIBUTION).sum().clamp(min=1)
        outputs = {"logits": output.logits}
        if self._measures_open_set_score:
            outputs["open_set_scores"] = algorithm.open_set_score(logits, output.heads)
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.guard.after_backward(super().training_step(*args, **kwargs))

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # upstream's estimate is for tokens

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and "learning_rate" in logs:
            logs = {**logs, **self.monitor.drain()}
            self.unreadable.report(self.state, self.args.device)
            self.unreadable.check({row: why for row, (_, why) in self.unreadable.known(self.state).items()})
        if "train_loss" in logs:
            logs["train_loss"] = self.monitor.mean_loss()  # in place: upstream returns this dictionary
        self.guard.note_skipped(logs)
        super().log(logs, start_time)

    def _published_weights(self) -> Any:
        """A context in which `self.model` holds the weights that are evaluated and saved."""
        return published_weights(self.model, self.ema if self.args.eval_weights == "ema" else None)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """As in `transformers.Trainer`. The card shows the last evaluation of each split."""
        split = "validation" if metric_key_prefix == "eval" else metric_key_prefix.removeprefix("eval_")
        named = self.eval_dataset if eval_dataset is None else eval_dataset
        dataset = self.eval_dataset[named] if isinstance(named, str) else named
        if isinstance(dataset, datasets.Dataset):
            self.survey.of_new(split, dataset)
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if isinstance(dataset, dict):  # upstream has called evaluate for each split
            return metrics
        self.add_results(split, _without_prefix(metrics, metric_key_prefix))
        self.evaluated[split] = dataset
        logits, labels = self._loop_output.predictions, self._loop_output.label_ids
        if np.shape(logits) == (np.size(labels), len(self.class_names)):  # the user's preprocessing may change them
            logits = logits.astype(np.float32, copy=False)
            self.predictions[split] = SplitPredictions(split, self.provenance, logits, labels)
        return metrics

    @property
    def provenance(self) -> Provenance:
        """The weights that are evaluated and saved now."""
        which, step = ("last", self.state.global_step) if self._best_step is None else ("best", self._best_step)
        return Provenance(self.args.eval_weights, step, which, self.args.seed)

    def add_results(self, split: str, metrics: Mapping[str, float]) -> None:
        """Record the results of a split with the current provenance, in place of earlier ones. `evaluate` calls it.

        `metrics` has values by the names of `ccssl_hf.metrics`, with a threshold if there is one: `precision@0.95`.
        """
        self.results[split] = [Result(name, value, split, self.provenance) for name, value in metrics.items()]

    @property
    def _measures_open_set_score(self) -> bool:
        """Whether the algorithm has its own open-set score. A user's metrics get logits only."""
        own = type(self.algorithm).open_set_score is not Algorithm.open_set_score
        return own and self.compute_metrics is default_metrics and self.preprocess_logits_for_metrics is None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        training = self.model.training
        self.guard.settle()
        try:
            with self._published_weights():
                output = super().evaluation_loop(*args, **kwargs)
        finally:
            self.model.train(training)  # upstream leaves the model in eval mode
        if self._measures_open_set_score and isinstance(output.predictions, tuple):  # scores are for metrics
            output = output._replace(predictions=output.predictions[0])
        check_outputs(output.predictions)
        self._loop_output = output  # for evaluate
        return output

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, ignore_keys_for_eval: Any = None
    ) -> Any:
        """As in `transformers.Trainer`. With True, the run resumes from the newest complete checkpoint.

        Ctrl-C and SIGTERM end it with a checkpoint: the first raises KeyboardInterrupt, the second SystemExit(143).
        Raises a ValueError if the output folder is in use or has results, and the run neither resumes nor overwrites
        them, or if the checkpoint is incomplete or of a run with other settings.
        """
        args, folder = self.args, str(self.args.output_dir)
        with (
            self.stop.listening(),
            one_run_in(folder, resume=resume_from_checkpoint, overwrite=args.overwrite) as checkpoint,
        ):
            self.run_facts = on_main_process(partial(resume.run_settings, self))
            if checkpoint is not None:
                on_main_process(
                    partial(resume.check_settings, checkpoint, self.run_facts, allow_changes=args.allow_changes)
                )
                self.stop.evaluation_due = resume.read_run(checkpoint)["evaluation_due"]
            if not self.survey.facts(self.train_dataset):
                self.check_data()
            self._best_step = None
            self.monitor = StepMonitor(self.class_names, skips=args.on_nonfinite == "skip")
            set_seed(args.seed)  # for dropout: random numbers drawn before must not matter
            output = super().train(checkpoint, trial, ignore_keys_for_eval)
            self.unreadable.report(self.state, args.device, total=True)
            self.stop.end_training()
        return output._replace(training_loss=output.metrics["train_loss"])

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        try:
            return super()._evaluate(*args, **kwargs)
        except EvaluationStopped:
            return {}

    def _init_training_state(self, max_steps: int, *args: Any) -> tuple[int, int]:
        epoch_and_batch = super()._init_training_state(max_steps, *args)
        self.state.compute_steps(self.args, max_steps)  # else save_steps and others would be those of the checkpoint
        return epoch_and_batch

    def _modules_with_state(self) -> dict[str, nn.Module]:
        averaged = {} if self.ema is None else {"ema": self.ema.module}
        return {"model": self.model, "algorithm": self.algorithm, **averaged}

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        resume.save_checkpoint(self, partial(super()._save_checkpoint, model, trial), trial)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        self.unreadable.report(self.state, self.args.device)  # the state of the checkpoint lists them
        super()._save_optimizer_and_scheduler(output_dir)
        state = self._modules_with_state(), self.monitor.state()
        resume.save_training_state(output_dir, *state, write=self.args.should_save)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # the state that is written next marks a complete checkpoint

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        sums = resume.load_training_state(resume_from_checkpoint, self._modules_with_state())
        self.monitor.load(sums, self.args.device)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with resume.new_rates(self.optimizer, self.lr_scheduler) if self.args.allow_changes else nullcontext():
            super()._load_optimizer_and_scheduler(checkpoint)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        name = str(self.args.metric_for_best_model)
        value = metrics.get(name if name.startswith("eval_") else f"eval_{name}", 0.0)
        best = bool(np.isfinite(value)) and not self.stop.evaluation_due
        return best and super()._determine_best_metric(metrics, trial)

    def _load_best_model(self) -> None:
        best = os.fspath(self.state.best_model_checkpoint or "")
        if self.state.global_step < self.state.max_steps:  # upstream might delete the checkpoint that continues the run
            self.state.best_model_checkpoint = None
        if self.stop.stopped:
            return
        logger.info("Loading the best model from %s.", best)
        resume.choose_checkpoint(str(self.args.output_dir), best)  # raises an error if it is not whole
        self._best_step = self.state.best_global_step
        # The last evaluation was of another step. The log has the results of the best one.
        self.predictions.clear()
        logged = [entry for entry in self.state.log_history if entry["step"] == self._best_step]
        for split in self.results:
            prefix = "eval" if split == "validation" else f"eval_{split}"
            self.add_results(split, _without_prefix({k: v for entry in logged for k, v in entry.items()}, prefix))
        resume.load_training_state(best, self._modules_with_state())

    def run_record(self) -> RunRecord:
        """What the run knows of itself at this moment: the card is written from it."""
        args, state = self.args, self.state
        counts = np.bincount(self.labels, minlength=len(self.class_names)).tolist()
        return RunRecord(
            backbone=self.model.config.architecture,
            class_names=self.class_names,
            algorithm=args.algorithm,
            hyperparameters=self.algorithm.hyperparameters,
            optimization=args.optimization_settings(),
            views=self.settings.in_effect(self.algorithm.views) | {"decode": self.decode},
            splits=self._splits(),
            unreadable={"unlabeled": dict(self.unreadable.known(state).values())},
            labeled_per_class=dict(zip(self.class_names, counts, strict=True)),
            base_model=self.base_model,
            steps=state.global_step,
            batch_size=args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            mu=args.mu if self.algorithm.views else None,
            seed=args.seed,
            versions=library_versions(),
            device=args.device.type,
            num_processes=args.world_size,
            run_time=next((entry["train_runtime"] for entry in state.log_history if "train_runtime" in entry), None),
            history=state.log_history,
            provenance=self.provenance,
            results=[*chain.from_iterable(self.results.values()), *self._logged_results()],
            predictions=list(self.predictions.values()),
        )

    def _splits(self) -> dict[str, Split]:
        """All splits with names and fingerprints. The fingerprint of a labeled split includes its labels."""
        args, names = self.args, [*self.class_names, ""]  # the last name is for -1
        splits = {"labeled": self.train_dataset, "unlabeled": self.unlabeled_dataset, "validation": self.eval_dataset}
        found = {}
        for role, split in (splits | self.evaluated).items():
            if not isinstance(split, datasets.Dataset):
                continue
            labels = []
            if role != "unlabeled" and args.label_column in split.column_names:
                labels = [names[number] for number in self._read_labels(split, role).tolist()]
            name = self.dataset_names.get(role) or data.name_of(split)
            fingerprint = data.fingerprint(split, args.image_column, labels)
            found[role] = Split(name, len(split), fingerprint, **self.survey.facts(split))
        return found

    def _logged_results(self) -> list[Result]:
        """Mask rate and precision of the last log: of the raw weights, as means over the steps before it."""
        logs = (entry for entry in reversed(self.state.log_history) if "mask_rate" in entry)
        last: dict[str, Any] = next(logs, {})
        provenance = Provenance("raw", last.get("step", 0), "last", self.args.seed)
        names = {"mask_rate": "mask_rate", "pseudo_label_precision": "training_precision"}
        return [Result(name, last[key], "unlabeled", provenance) for key, name in names.items() if key in last]

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write the published model. Upstream also writes `training_args.bin`, which holds the Hub token."""
        if self.args.should_save:
            self.model.save_pretrained(output_dir or self.args.output_dir, state_dict=state_dict)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the published model and its card, and push both with `args.push_to_hub`.

        Call it in every process: the main process writes, but all average the BatchNorm statistics.
        """
        self.guard.check_state()
        with self._published_weights():  # not in _save, which some releases call on one process only
            super().save_model(output_dir, _internal_call=True)
        if not _internal_call:
            self.create_model_card(folder=output_dir)
            if self.args.push_to_hub:
                self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def create_model_card(  # upstream's other arguments are in the record
        self,
        model_name: str | None = None,
        license: str | None = None,
        tags: list[str] | None = None,
        limits: str | None = None,
        folder: str | None = None,
    ) -> None:
        """Write README.md and its pictures to `folder`. An error is logged: a failing card never loses a run.

        Results and pictures show the last evaluation of each split. An existing card is overwritten; `ccssl-hf report`
        keeps text that was added by hand. `license` is the Hub's identifier, such as `apache-2.0`.
        """
        if not self.is_world_process_zero():
            return
        path = Path(folder or str(self.args.output_dir))
        name = model_name or self.hub_model_id or path.name
        try:
            write_card(self.run_record(), path, model_name=name, license=license, tags=tags, limits=limits)
        except Exception:
            logger.exception("The model card could not be written; the model is saved. Call create_model_card again.")

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        with_head: bool = False,
        **card: Any,
    ) -> CommitInfo | Future[CommitInfo] | None:
        """Save and upload the published model and its card, and with `with_head` all heads. Call it in every process.

        If the upload fails, everything is saved: call it again. `card` holds arguments of `create_model_card`.
        """
        self.save_model(_internal_call=True)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**card)
        self._finish_current_push()
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        files, args = plan_push(str(self.args.output_dir), with_head=with_head).files, self.args
        options: dict[str, Any] = {"private": args.hub_private_repo if private is None else private}
        options |= {"revision": revision or args.hub_revision, "token": token or args.hub_token}
        push = partial(upload, files, str(self.hub_model_id), message=commit_message, **options)
        return push() if blocking else run_as_future(push)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Upload a checkpoint in the background, as `hub_strategy` asks. Upstream also uploads `training_args.bin`."""
        args = self.args
        if not self.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
            return
        if all(job.done() for job in self._pushes):
            self._finish_current_push()
        elif not args.hub_always_push:
            return
        self.callback_handler.on_push_begin(args, self.state, self.control)
        options = {"private": args.hub_private_repo, "revision": args.hub_revision, "token": args.hub_token}
        message = f"Training in progress, step {self.state.global_step}"
        folder, strategy, repo_id = Path(checkpoint_folder), HubStrategy(args.hub_strategy), str(self.hub_model_id)
        self._pushes.append(upload_checkpoint(folder, repo_id, strategy=strategy, message=message, **options))

    def _finish_current_push(self) -> None:
        """Wait for uploads of checkpoints. An error is logged: the checkpoint is saved here, and training goes on."""
        for job in self._pushes:
            if error := job.exception():
                logger.warning("A checkpoint was not pushed: %s", error)
        self._pushes.clear()


def _names(*given: Any) -> list[str]:
    """The classes of what a user passed to the trainer, with the arguments of a class."""
    return [str(x) if isinstance(x, (type, dict)) else type(x).__qualname__ for x in given if x is not None]


def _without_prefix(metrics: Mapping[str, float], prefix: str) -> dict[str, float]:
    """The metrics of an evaluation that a card shows, without their prefix."""
    names = [name for name, metric in METRICS.items() if metric.section != "pseudo labels"]
    return {name: metrics[f"{prefix}_{name}"] for name in names if f"{prefix}_{name}" in metrics}
