"""The few-lines-of-Python way in: `LoRAModel`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from trivet.adapter.save import Proof, cast, merge, save_adapter
from trivet.config import Config
from trivet.configio import load as load_config
from trivet.data.dataset import Dataset, load_dataset
from trivet.data.detect import Example
from trivet.data.encode import LabelEncoder, TextEncoder
from trivet.errors import ConfigError, ModelError
from trivet.evaluate.generate import generate
from trivet.evaluate.measure import Settings
from trivet.evaluate.score import head_scores
from trivet.four_bit import to_plain
from trivet.model import check_base
from trivet.run import train
from trivet.session import LABELLED, Session, begin, reopen


class LoRAModel:
    """A base model to be fine-tuned, and then the tuned model.

    >>> model = LoRAModel(base_model="gpt2", lora_rank=8)
    >>> result = model.finetune(load_dataset("train.jsonl"))
    >>> model.generate("Once upon a time")
    """

    def __init__(
        self, base_model: str | Path | None = None, lora_rank: int | None = None, *, config: Any = None, **settings: Any
    ) -> None:
        """
        Args:
            base_model: hub id, local folder, GGUF file, `demo` or `demo-encoder`.
            lora_rank: r of each layer's update; default 8.
            config: a YAML file or a `Config` to start from; the other arguments override it.
            settings: any key of the config by its dotted or bare name or alias, for example `learning_rate=1e-4`,
                `num_epochs=1`, `output_dir="runs/mine"`, `**{"evaluation.generate": False}`.

        Raises:
            ConfigError: an unknown key, a wrong value, or no such model.
        """
        values = dict(settings)
        if base_model is not None:
            values["model.name"] = str(base_model)
        if lora_rank is not None:
            values["model.lora_rank"] = lora_rank
        self.config = _configured(config, values)
        check_base(self.config.model.name)
        self._session: Session | None = None
        self._merged = False

    @property
    def session(self) -> Session:
        """The loaded model with its adapter; before training, the base model with an adapter that does nothing."""
        if self._merged:
            raise ConfigError("this model was merged, which used it up; go on with the merged model, or load() again")
        if self._session is None:
            example = Dataset([Example(prompt="", completion="")], "prompt-completion", "nothing yet")
            self._session = begin(replace(self.config, method="lora"), example)  # no other start does less
        return self._session

    @property
    def model(self) -> Any:
        """The `peft.PeftModel`."""
        return self.session.model

    @property
    def tokenizer(self) -> Any:
        return self.session.tokenizer

    def finetune(
        self,
        dataset: Any = None,
        validation: Any = None,
        test: Any = None,
        *,
        resume: bool = False,
        overwrite: bool = False,
        quiet: bool = False,
        **settings: Any,
    ) -> dict[str, Any]:
        """Train on `dataset`, save the adapter to the run folder, evaluate base and tuned.

        Returns what result.json holds.

        Args:
            dataset: what `load_dataset` returns or takes: a path, hub id, list of dicts, `datasets.Dataset`. None takes
                the config's `data.train`.
            validation: likewise; by default 5% of `dataset` is held out.
            test: likewise; evaluated once, after training. Without it the final figures are on the validation rows.
            resume: go on with an interrupted run in `output_dir`.
            overwrite: replace a run in `output_dir`.
            quiet: print nothing.
            settings: as for the constructor.
        """
        config = _configured(self.config, settings)
        self._session = None  # the base model is loaded for the task that the data asks for
        outcome = train(
            config,
            resume=resume,
            overwrite=overwrite,
            console=Console(stderr=True, quiet=quiet),
            train=dataset,
            validation=validation,
            test=test,
        )
        self.config, self._session, self._merged = config, outcome.session, False
        return outcome.result

    def evaluate(self, dataset: Any, **settings: Any) -> dict[str, Any]:
        """Base and tuned side by side on `dataset`: `metrics`, `intervals` (95%, bootstrap) and `n`."""
        config = _configured(self.config, settings)
        chosen = Settings.of(config.evaluation)
        rows = self._rows(dataset)
        return self.session.evaluator(rows, chosen).side_by_side(self.model).to_dict()

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        system: str = "",
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        adapter: bool = True,
    ) -> Any:
        """Answer one prompt (text in, text out) or several (list in, list out).

        Prompts are put to the model as in training, with the chat template where training applied it.
        `temperature` 0 is greedy; `adapter=False` answers with the base model. Raises `ModelError` for a classifier.
        """
        encoder = self.session.encoder
        if not isinstance(encoder, TextEncoder):
            raise ModelError(f"a model for {self.session.base.task} writes no text; use predict()")
        several = [prompts] if isinstance(prompts, str) else list(prompts)
        room = max_new_tokens or self.config.evaluation.max_new_tokens
        asked = [encoder.prompt_ids(Example(prompt=p, system=system), room) for p in several]
        options: dict[str, Any] = {
            "stop_ids": encoder.stop_ids(),
            "max_new_tokens": room,
            "batch_size": self.config.evaluation.batch_size,
            "temperature": temperature,
            "top_p": top_p,
        }
        if adapter:
            answers = generate(self.model, self.tokenizer, asked, **options)
        else:
            with self.model.disable_adapter():
                answers = generate(self.model, self.tokenizer, asked, **options)
        return answers[0] if isinstance(prompts, str) else answers

    def predict(self, texts: str | Sequence[str], text_pairs: str | Sequence[str] | None = None) -> Any:
        """The class (or number) for each text. Raises `ModelError` for a model that writes text."""
        encoder = self.session.encoder
        if not isinstance(encoder, LabelEncoder):
            raise ModelError(f"a model for {self.session.base.task} has no classes; use generate()")
        several = [texts] if isinstance(texts, str) else list(texts)
        pairs: list[str | None] = [None] * len(several)
        if text_pairs is not None:
            pairs = [text_pairs] if isinstance(text_pairs, str) else list(text_pairs)
        if len(pairs) != len(several):
            raise ConfigError(f"predict() was given {len(several)} texts but {len(pairs)} second texts; pair them up")
        rows = [encoder.inputs(text, pair) for text, pair in zip(several, pairs, strict=True)]
        size = self.config.evaluation.batch_size
        scores = head_scores(self.model, rows, self.session.collator, batch_size=size)
        names = encoder.labels
        found = [float(s[0]) for s in scores] if names is None else [names[int(s.argmax())] for s in scores]
        return found[0] if isinstance(texts, str) else found

    def save(self, folder: str | Path) -> Proof:
        """Write the adapter (PEFT's form) with its tokenizer; reloaded and compared before it counts."""
        target = _free(folder)
        return save_adapter(
            self.model, target, self.session.probe(), tokenizer=self.tokenizer, notes=self.session.notes()
        )

    @classmethod
    def load(cls, folder: str | Path, *, base_model: str | None = None, **settings: Any) -> LoRAModel:
        """Open a saved adapter or a run folder; `base_model` where the adapter does not say which it belongs to."""
        config = _configured(None, settings)
        session = reopen(
            Path(folder),
            base_model=base_model,
            dtype=config.model.dtype,
            device=config.model.device,
            fast=config.training.fast,
        )
        loaded = cls.__new__(cls)
        loaded.config = replace(config, model=replace(config.model, name=session.base.name))
        loaded._session, loaded._merged = session, False
        return loaded

    def merge(self, folder: str | Path | None = None) -> Any:
        """The full transformers model with the update added to its weights; also written to `folder` where given.

        Uses this object up: load the adapter again to go on with it.
        """
        session, target = self.session, None if folder is None else _free(folder)
        self._session, self._merged = None, True
        if target is not None:
            merged, _ = merge(session.model, target, session.probe(), tokenizer=session.tokenizer)
            return merged
        dtype = session.model.dtype
        whole = session.model.float().merge_and_unload()
        to_plain(whole)
        cast(whole, dtype)
        whole.config.use_cache = True
        return whole

    def _rows(self, dataset: Any) -> Dataset:
        task = self.session.base.task
        if task in LABELLED and not isinstance(dataset, Dataset):
            return load_dataset(dataset, split="test", format=task)
        return load_dataset(dataset, split="test")


def _configured(config: Any, values: dict[str, Any]) -> Config:
    if isinstance(config, Config):
        return load_config(None, values=values, start=config)
    return load_config(config, values=values)


def _free(folder: str | Path) -> Path:
    path = Path(folder)
    if path.exists() and (path.is_file() or any(path.iterdir())):
        raise ConfigError(f"{path}: exists already; name another folder, or remove it first")
    return path
