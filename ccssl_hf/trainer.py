"""`CCSSLTrainer`: a `transformers.Trainer` that feeds three views of two splits to one algorithm."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import EvalPrediction, Trainer, TrainerCallback, set_seed
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK

from . import data
from .algorithms import Algorithm, build_algorithm
from .callbacks import StepMonitor, UpdateAverage, progress_callback
from .distributed import copy_from_main_process
from .ema import WeightAverage, published_weights
from .metrics import compute_metrics as default_metrics
from .modeling import CCSSLForImageClassification
from .optimization import cosine_7_16_schedule, decayed_parameter_names
from .publishing import PublishingTrainer
from .record import METRICS, Provenance, Result, SplitPredictions
from .resume import last_checkpoint, load_training_state, save_training_state
from .sampling import PairedBatchSampler
from .step import forward_views, make_views
from .training_args import CCSSLTrainingArguments
from .transforms import MAX_SIDE_HELD, ViewSettings

logger = logging.getLogger(__name__)


class CCSSLTrainer(PublishingTrainer):
    """Trains a `CCSSLForImageClassification` on a labeled and an unlabeled split.

    Everything else is `transformers.Trainer`: `train`, `evaluate`, `predict`, `save_model`, `push_to_hub`, callbacks,
    DDP through accelerate, resuming. Evaluation, saving and publishing use the averaged weights (`args.eval_weights`).

    Args:
        model: The model to train.
        args: The run's arguments.
        train_dataset: Labeled images.
        unlabeled_dataset: Unlabeled images; may be None only where the algorithm reads none.
        eval_dataset: Labeled images, or a dictionary of such splits. Rows labeled -1, or with a name that is none of
            the model's classes, count as out of distribution.
        compute_metrics: As in `transformers.Trainer`; default `classification_metrics`.
        callbacks, optimizers, optimizer_cls_and_kwargs, preprocess_logits_for_metrics: As in `transformers.Trainer`.

    Raises:
        TypeError: `model` or `args` is of another class.
        ValueError: The data can't be trained on; the sentence names the fix. Raised before any work is done.
    """

    args: CCSSLTrainingArguments

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
        _check_types(model, args)
        self.class_names = model.config.labels
        self.settings = args.view_settings(model.backbone.pretrained_cfg)
        self._cropped = _is_streamed(args, self.settings)  # then each view comes with a crop of its own
        self.unlabeled_dataset = unlabeled_dataset
        self._check_data(args, train_dataset, unlabeled_dataset, eval_dataset)
        self.algorithm = self._build_algorithm(model, args)
        data.check_writable(args.output_dir)

        # What no loss reaches is frozen, or DDP would wait for its gradient.
        model.projection.requires_grad_(self.algorithm.needs_embeddings)
        for name, head in model.heads.items():
            head.requires_grad_(name in self.algorithm.heads)
        if args.device.type != "cpu":
            # On a CPU, convolutions bring weights into a format of their own, and the fused SGD copies those that are
            # not contiguous: images alone in channels_last are as fast there, and the optimizer four times.
            model.to(memory_format=torch.channels_last)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=_already_a_batch,
            compute_metrics=compute_metrics or default_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        if args.n_gpu > 1:
            raise ValueError(
                f"One process sees {args.n_gpu} GPUs, and DataParallel would split the batch's pairs: start the "
                "run with `accelerate launch`, or show it one GPU with CUDA_VISIBLE_DEVICES."
            )
        self.loss_is_scaled_for_ga = False  # compute_loss returns the mean of one batch
        self.algorithm.to(args.device)
        self.model.to(args.device)  # upstream waits with it under bf16_full_eval, but the average starts as a copy
        copy_from_main_process(self.model)  # DDP does so too late for that
        self.ema = WeightAverage(self.model, args.ema_decay) if args.ema_decay else None
        self.monitor = StepMonitor(self.class_names)
        self.results: dict[str, list[Result]] = {}  # what the card says of each split, and, below, draws of it
        self.predictions: dict[str, SplitPredictions] = {}
        self.evaluated: dict[str, datasets.Dataset] = {}
        self.dataset_names: dict[str, str] = {}  # what the card calls the splits, where their own name is not it
        self.base_model: str | None = None  # what the card calls the weights that training started from
        self._best_step: int | None = None
        self._loop_output: Any = None  # of the evaluation that is going on
        if self.ema is not None:
            self.add_callback(UpdateAverage(self.ema))
        if not args.disable_tqdm:
            self.remove_callback(DEFAULT_PROGRESS_CALLBACK)
            self.add_callback(progress_callback())

    # ----------------------------------------------------------------------------------------------------------- set-up

    def _check_data(
        self,
        args: CCSSLTrainingArguments,
        labeled: datasets.Dataset,
        unlabeled: datasets.Dataset | None,
        evaluation: datasets.Dataset | dict[str, datasets.Dataset] | None,
    ) -> None:
        data.check_images(labeled, role="labeled", image_column=args.image_column)
        self.labels = data.read_labels(labeled, args.label_column, self.class_names, role="labeled", allow_ood=False)
        batch = args.per_device_train_batch_size * args.world_size
        if len(labeled) < batch and not args.repeat_labeled:
            raise ValueError(
                f"{len(labeled)} labeled images are fewer than a batch of {batch}: lower per_device_train_batch_size, "
                "or set repeat_labeled=True to let images repeat in a batch, as the paper does with 40 labels."
            )
        self.hidden_labels = None
        if unlabeled is not None:
            data.check_images(unlabeled, role="unlabeled", image_column=args.image_column)
            if len(unlabeled) < args.mu * batch:
                raise ValueError(
                    f"{len(unlabeled)} unlabeled images are fewer than the {args.mu * batch} of a step: lower mu or "
                    "per_device_train_batch_size."
                )
            if args.hidden_label_column is not None:
                self.hidden_labels = data.read_labels(
                    unlabeled, args.hidden_label_column, self.class_names, role="unlabeled", allow_ood=True
                )
        for name, split in evaluation.items() if isinstance(evaluation, dict) else [("evaluation", evaluation)]:
            if split is not None:
                self._evaluation_labels(split, name, args)

    def _evaluation_labels(self, split: datasets.Dataset, role: str, args: CCSSLTrainingArguments) -> np.ndarray:
        data.check_images(split, role=role, image_column=args.image_column)
        return data.read_labels(split, args.label_column, self.class_names, role=role, allow_ood=True)

    def _build_algorithm(self, model: CCSSLForImageClassification, args: CCSSLTrainingArguments) -> Algorithm:
        algorithm = build_algorithm(
            args.algorithm,
            num_classes=len(self.class_names),
            num_unlabeled=len(self.unlabeled_dataset or ()),  # none at all is answered below
            embedding_dim=model.config.projection_dim,
            batch_size=args.per_device_train_batch_size * args.world_size,
            mu=args.mu,
            **args.hyperparameters(),
        )
        model.add_heads({name: make(model.feature_dim) for name, make in algorithm.heads.items()})
        if algorithm.views and self.unlabeled_dataset is None:
            raise ValueError(
                f"Algorithm {args.algorithm!r} with these settings learns from "
                "unlabeled images: pass unlabeled_dataset, or set algorithm='supervised' and lambda_contrast=0."
            )
        if not algorithm.views and self.unlabeled_dataset is not None:
            logger.warning("Algorithm %r reads no unlabeled images: unlabeled_dataset is left alone.", args.algorithm)
        return algorithm

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Found by module type; upstream goes by name, and timm's `bn1` and `norm1` are names it does not know."""
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
        self.lr_scheduler = cosine_7_16_schedule(
            optimizer or self.optimizer,
            warmup_steps=self.args.get_warmup_steps(num_training_steps),
            total_steps=num_training_steps,
        )
        self._created_lr_scheduler = True
        return self.lr_scheduler

    # ------------------------------------------------------------------------------------------------------------- data

    def get_train_dataloader(self) -> DataLoader:
        """Batches of both splits; one long epoch, because each split has epochs of its own inside the sampler."""
        args, algorithm = self.args, self.algorithm
        unlabeled = self.unlabeled_dataset if algorithm.views else None
        with args.main_process_first(desc="decoding images"):
            dataset = data.PairedDataset(
                self.train_dataset,
                self.labels,
                unlabeled,
                hidden_labels=self.hidden_labels,
                image_column=args.image_column,
                views=algorithm.views,
                settings=self.settings,
                seed=args.seed,
                decode="stream" if self._cropped else "memory",
            )
        sampler = PairedBatchSampler(
            num_labeled=len(dataset.labeled),
            num_unlabeled=0 if dataset.unlabeled is None else len(dataset.unlabeled),
            batch_size=args.per_device_train_batch_size,
            mu=args.mu,
            num_batches=args.max_steps * args.gradient_accumulation_steps * args.world_size,
            seed=args.seed,
        )
        loader = DataLoader(
            dataset,
            batch_sampler=sampler,  # type: ignore[arg-type]  # torch's stub knows lists only; any index will do
            collate_fn=_already_a_batch,
            **self._loading(decodes=self._cropped),
        )
        return self.accelerator.prepare(loader)

    def _loading(self, *, decodes: bool) -> dict[str, Any]:
        """The flags of a loader, `decodes`: of one whose batches take decoding."""
        args, workers = self.args, self.args.dataloader_num_workers
        if workers == -1:
            workers = data.default_workers(args.device) if decodes else 0
        return {
            "num_workers": workers,
            "pin_memory": args.dataloader_pin_memory and args.device.type == "cuda",
            "persistent_workers": args.dataloader_persistent_workers and workers > 0,
            "prefetch_factor": args.dataloader_prefetch_factor if workers else None,
        }

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        name = eval_dataset if isinstance(eval_dataset, str) else "evaluation"
        split = self.eval_dataset[eval_dataset] if isinstance(eval_dataset, str) else eval_dataset
        split = self.eval_dataset if split is None else split
        if split is None:
            raise ValueError("There is nothing to evaluate on: pass eval_dataset to CCSSLTrainer or to evaluate().")
        return self._evaluation_dataloader(split, self._evaluation_labels(split, name, self.args), name)

    def get_test_dataloader(self, test_dataset: datasets.Dataset) -> DataLoader:
        has_labels = self.args.label_column in test_dataset.column_names
        data.check_images(test_dataset, role="test", image_column=self.args.image_column)
        labels = self._evaluation_labels(test_dataset, "test", self.args) if has_labels else None
        if labels is not None and (labels == data.OUT_OF_DISTRIBUTION).all():
            labels = None  # withheld, as in many a test split: there is nothing to measure
        return self._evaluation_dataloader(test_dataset, labels, "test")

    def _evaluation_dataloader(self, split: datasets.Dataset, labels: np.ndarray | None, role: str) -> DataLoader:
        dataset = data.EvaluationDataset(
            split,
            labels,
            image_column=self.args.image_column,
            transform=create_transform(**resolve_data_config(pretrained_cfg=self.model.backbone.pretrained_cfg)),
            role=role,
        )
        loader = DataLoader(
            dataset,
            batch_size=self.args.per_device_eval_batch_size,
            generator=torch.Generator(),  # else each evaluation draws a number that dropout in training would have had
            **self._loading(decodes=True),
        )
        return self.accelerator.prepare(loader)

    # ------------------------------------------------------------------------------------------------------------- step

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The algorithm's loss in training; plain cross-entropy over the known classes in evaluation."""
        if "labeled_images" in inputs:
            views = make_views(inputs, self.algorithm.views, self.settings, seed=self.args.seed, cropped=self._cropped)
            batch = forward_views(
                model,
                views,
                inputs,
                with_embeddings=self.algorithm.needs_embeddings,
                weak_forward=self.args.weak_forward,
            )
            result = self.algorithm(batch)
            self.monitor.add(result, inputs.get("hidden_labels"))
            return result.loss
        output = model(pixel_values=inputs["pixel_values"])
        logits = output.logits
        known = (inputs["labels"] != data.OUT_OF_DISTRIBUTION).sum()
        loss = F.cross_entropy(logits.float(), inputs["labels"], ignore_index=data.OUT_OF_DISTRIBUTION, reduction="sum")
        loss = loss / known.clamp(min=1)  # a batch without a known class must not make the split's mean NaN
        outputs = {"logits": logits}
        if self._measures_open_set_score:
            outputs["open_set_scores"] = self.algorithm.open_set_score(logits.float(), output.heads)
        return (loss, outputs) if return_outputs else loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # upstream's estimate is for tokens

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and "learning_rate" in logs:
            logs = {**logs, **self.monitor.drain()}
        super().log(logs, start_time)

    # ------------------------------------------------------------------------------------------------------- evaluation

    def _published_weights(self) -> Any:
        """Context in which `self.model` holds the weights that are evaluated and saved."""
        return published_weights(self.model, self.ema if self.args.eval_weights == "ema" else None)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """As in `transformers.Trainer`; what was measured last on each split goes onto the card."""
        self._loop_output = None
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        output, self._loop_output = self._loop_output, None
        if output is None:  # a dictionary of splits: each of them has come by here
            return metrics
        split = "validation" if metric_key_prefix == "eval" else metric_key_prefix.removeprefix("eval_")
        self.add_results(split, _without_prefix(metrics, metric_key_prefix))
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        self.evaluated[split] = self.eval_dataset[dataset] if isinstance(dataset, str) else dataset
        logits, labels = output.predictions, output.label_ids
        if np.shape(logits) == (np.size(labels), len(self.class_names)):  # metrics of the user's own may change them
            logits = logits.astype(np.float32, copy=False)
            self.predictions[split] = SplitPredictions(split, self.provenance, logits, labels)
        return metrics

    @property
    def provenance(self) -> Provenance:
        """Which weights are evaluated and saved now."""
        which, step = ("last", self.state.global_step) if self._best_step is None else ("best", self._best_step)
        return Provenance(self.args.eval_weights, step, which, self.args.seed)

    def add_results(self, split: str, metrics: Mapping[str, float]) -> None:
        """Puts numbers onto the card that were measured on `split` with the weights that are evaluated now.

        They take the place of what the card said of this split. `evaluate` calls it by itself.

        Args:
            split: Such as `test`.
            metrics: By the names of `ccssl_hf.metrics`, which may carry a confidence, as in `precision@0.95`.
        """
        self.results[split] = [Result(name, value, split, self.provenance) for name, value in metrics.items()]

    @property
    def _measures_open_set_score(self) -> bool:
        """Whether the algorithm has an open-set score besides confidence. Metrics of the user's get logits alone."""
        own = type(self.algorithm).open_set_score is not Algorithm.open_set_score
        return own and self.compute_metrics is default_metrics and self.preprocess_logits_for_metrics is None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        training = self.model.training
        with self._published_weights():
            output = super().evaluation_loop(*args, **kwargs)
        self.model.train(training)  # upstream leaves the model in eval mode
        if self._measures_open_set_score and isinstance(output.predictions, tuple):  # the scores were for the metrics
            output = output._replace(predictions=output.predictions[0])
        self._loop_output = output
        return output

    # ------------------------------------------------------------------------------------------------------ checkpoints

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """The plain folder, with the weights that are evaluated. No `training_args.bin`: it holds the Hub token."""
        if self.args.should_save:
            self.model.save_pretrained(output_dir or self.args.output_dir, state_dict=state_dict)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in `transformers.Trainer`, and the card beside it. Call it in every process: all have a part in it."""
        with self._published_weights():  # not in _save, which some releases call on one process only
            super().save_model(output_dir, _internal_call)

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """As in `transformers.Trainer`; with True the run goes on from the last checkpoint that is whole."""
        if resume_from_checkpoint in (True, "true", "True"):  # the command line knows texts only
            resume_from_checkpoint = last_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"{self.args.output_dir} holds no whole checkpoint to go on from: start without "
                    "resume_from_checkpoint."
                )
        self._best_step = None
        self.monitor = StepMonitor(self.class_names)
        set_seed(self.args.seed)  # for dropout, which must not depend on what was drawn since the trainer was made
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def _modules_with_state(self) -> dict[str, nn.Module]:
        averaged = {} if self.ema is None else {"ema": self.ema.module}
        return {"model": self.model, "algorithm": self.algorithm, **averaged}

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        save_training_state(output_dir, self._modules_with_state(), write=self.args.should_save)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # the state that the main process writes next marks a whole checkpoint

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_training_state(resume_from_checkpoint, self._modules_with_state())

    def _load_best_model(self) -> None:
        logger.info("Loading the best model from %s.", self.state.best_model_checkpoint)
        self._best_step = self.state.best_global_step
        # What was measured last was another step's: the log still knows this one's numbers.
        self.predictions.clear()
        logged = [entry for entry in self.state.log_history if entry["step"] == self._best_step]
        for split in self.results:
            prefix = "eval" if split == "validation" else f"eval_{split}"
            self.add_results(split, _without_prefix({k: v for entry in logged for k, v in entry.items()}, prefix))
        self._load_from_checkpoint(os.fspath(self.state.best_model_checkpoint or ""))


def _without_prefix(metrics: Mapping[str, float], prefix: str) -> dict[str, float]:
    """Those of an evaluation that a card names, by their own names."""
    names = [name for name, metric in METRICS.items() if metric.section != "pseudo labels"]
    return {name: metrics[f"{prefix}_{name}"] for name in names if f"{prefix}_{name}" in metrics}


def _already_a_batch(batch: Any) -> Any:
    return batch


def _check_types(model: Any, args: Any) -> None:
    if not isinstance(args, CCSSLTrainingArguments):
        raise TypeError(f"args is a {type(args).__name__}: pass ccssl_hf.CCSSLTrainingArguments.")
    if not isinstance(model, CCSSLForImageClassification):
        raise TypeError(f"model is a {type(model).__name__}: build one with CCSSLForImageClassification.from_timm.")


def _is_streamed(args: CCSSLTrainingArguments, settings: ViewSettings) -> bool:
    streamed = args.decode == "stream" or (args.decode == "auto" and settings.image_size > MAX_SIDE_HELD)
    if streamed and settings.weak_crop == "pad":
        raise ValueError("weak_crop='pad' shifts images held at the training size: set weak_crop='resized' to stream.")
    return streamed
