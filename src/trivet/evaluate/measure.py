"""Which metrics a data set gets, and the two sides of every evaluation: the base model and the tuned one."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from trivet.data.batch import Collator
from trivet.data.dataset import Dataset
from trivet.data.encode import LabelEncoder, TextEncoder, encode_dataset, references
from trivet.evaluate.compare import Comparison, compare
from trivet.evaluate.generate import generate
from trivet.evaluate.metrics import (
    Metric,
    choice_metrics,
    classification_metrics,
    likelihood_metrics,
    number_match,
    regression_metrics,
)
from trivet.evaluate.reading import read, reads_once, score_endings
from trivet.evaluate.score import Scorer, batches, evaluating, head_scores, likelihood, without_ending


@dataclass(frozen=True)
class Settings:
    """How to evaluate; see `trivet.config.EvaluationConfig`."""

    batch_size: int = 16
    generate: bool = True
    max_generate_rows: int = 200
    max_new_tokens: int = 128
    resamples: int = 1000

    @classmethod
    def of(cls, section: Any) -> Settings:
        """From anything with these attributes, such as the config's section."""
        return cls(**{name: getattr(section, name) for name in cls.__dataclass_fields__})


@dataclass(frozen=True)
class Side:
    """One model's metrics, in groups over the same examples, and what it wrote or predicted for each example."""

    groups: Sequence[Sequence[Metric]]
    outputs: Sequence[str] = ()


@dataclass(frozen=True)
class Evaluation:
    """Base and tuned side by side on one data set."""

    comparisons: Sequence[Comparison]
    predictions: Sequence[dict[str, Any]] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """`metrics` and `intervals` by side and name, and `n`, the number of examples behind each metric."""
        out: dict[str, Any] = {"metrics": {}, "intervals": {}, "n": {}}
        for comparison in self.comparisons:
            part: dict[str, Any] = comparison.to_dict()
            for kind in ("metrics", "intervals"):
                for side, values in part[kind].items():
                    out[kind].setdefault(side, {}).update(values)
            out["n"] |= dict.fromkeys(comparison.metrics, comparison.n)
        return out

    def table(self) -> list[tuple[str, str, str, str, str]]:
        """Printable rows: metric, base, tuned, difference with its interval, n."""
        return [(*row, str(c.n)) for c in self.comparisons for row in c.table()]


class Evaluator:
    """Evaluates one model on one data set; encoded once, used for every side."""

    def __init__(
        self,
        dataset: Dataset,
        encoder: TextEncoder | LabelEncoder,
        *,
        task: str,
        shift: Callable[..., Any] | None = None,
        settings: Settings | None = None,
    ) -> None:
        """`shift` makes an encoder-decoder's decoder inputs from its labels."""
        self.dataset, self.encoder, self.task = dataset, encoder, task
        self.settings = settings or Settings()
        self.collator = Collator(encoder.tokenizer.pad_token_id, shift=shift)
        self.rows, self.summary = encode_dataset(dataset, encoder)
        answered = [e for e in dataset if e.text is None] if isinstance(encoder, TextEncoder) else []
        choosing = dataset.format == "multiple-choice"
        self.asked = answered[: self.settings.max_generate_rows] if self.settings.generate and not choosing else []

    def measure(self, model: Any, progress: Callable[[int], None] | None = None) -> Side:
        """Metrics of `model` as it is now."""
        if isinstance(self.encoder, LabelEncoder):
            return self._measure_head(model)
        scorer = Scorer(model, self.rows, self.collator, self.task)
        choosing = self.dataset.format == "multiple-choice"
        picked = self._choose(model, self.encoder, scorer) if choosing else []
        texts = self._answers(model, self.encoder, scorer, progress) if self.asked else []
        scored = scorer.finish(self.settings.batch_size)
        groups = [likelihood_metrics(scored.nll, scored.tokens, scored.correct)]  # type: ignore[arg-type]
        if choosing:
            groups.append(choice_metrics([p == e.answer for p, e in zip(picked, self.dataset, strict=True)]))
            texts = [e.choices[p] for p, e in zip(picked, self.dataset, strict=True)]
            return Side(groups, texts)
        if not self.asked:
            return Side(groups)
        from trivet.evaluate.text_metrics import text_metrics

        written = text_metrics(texts, [list(references(e)) for e in self.asked])
        if all(e.number is not None for e in self.asked):
            written.append(number_match(texts, [str(e.number) for e in self.asked]))
        return Side([*groups, written], texts)

    def _answers(
        self, model: Any, encoder: TextEncoder, scorer: Scorer, progress: Callable[[int], None] | None
    ) -> list[str]:
        """What the model writes; where it can go on from rows that it has scored, it reads each prompt only once."""
        new = self.settings.max_new_tokens
        prompts = [encoder.prompt_ids(example, new) for example in self.asked]

        def go_on(indices: list[int], room: int) -> dict[str, Any]:
            return read(scorer, indices, [len(prompts[i]) for i in indices], room)

        return generate(
            model,
            encoder.tokenizer,
            prompts,
            stop_ids=encoder.stop_ids(),
            max_new_tokens=new,
            batch_size=self.settings.batch_size,
            progress=progress,
            read=go_on if self._single and reads_once(model, self.rows[: len(prompts)], prompts) else None,
        )

    def _measure_head(self, model: Any) -> Side:
        scores = head_scores(model, self.rows, self.collator, batch_size=self.settings.batch_size)
        gold = np.array([row["labels"] for row in self.rows])
        names = self.encoder.labels if isinstance(self.encoder, LabelEncoder) else None
        if names is None:
            values = scores[:, 0]
            return Side([regression_metrics(values.tolist(), gold.tolist())], [f"{v:.4g}" for v in values])
        picked = scores.argmax(1)
        top = scores.max(1, keepdims=True)
        nll = np.log(np.exp(scores - top).sum(1)) + top[:, 0] - scores[np.arange(len(gold)), gold]
        loss = likelihood_metrics(nll.tolist(), [1] * len(gold), (picked == gold).tolist())[0]
        metrics = [loss, *classification_metrics(picked.tolist(), gold.tolist(), len(names))]
        return Side([metrics], [names[i] for i in picked])

    @property
    def _single(self) -> bool:
        """Whether each example made one row."""
        return self.summary.origins == [example.origin for example in self.dataset]

    def _choose(self, model: Any, encoder: TextEncoder, scorer: Scorer) -> list[int]:
        """The choice with the highest log-likelihood per UTF-8 byte (lm-evaluation-harness's acc_norm).

        Where it can be, a prompt is read once for all of its choices, together with the row that is scored anyway.
        """
        encoder = copy.copy(encoder)
        encoder.loss_on = "responses"  # the prompt is the same for every choice, whatever is trained on
        choices = [
            [without_ending(encoder.encode(replace(example, completion=choice))[0][0]) for choice in example.choices]
            for example in self.dataset
        ]
        prompts, size = [encoder.prompt_ids(example) for example in self.dataset], self.settings.batch_size
        rows = [row for each in choices for row in each]
        asked = [prompt for prompt, each in zip(prompts, choices, strict=True) for _ in each]
        if self._single and reads_once(model, [*self.rows, *rows], [*prompts, *asked]):
            nll: list[np.ndarray] = [np.zeros(0)] * len(choices)
            with evaluating(model):
                for batch in batches(self.rows, max(1, size // max(map(len, choices)))):
                    lengths, others = [len(prompts[i]) for i in batch], [choices[i] for i in batch]
                    for i, found in zip(batch, score_endings(scorer, batch, lengths, others), strict=True):
                        nll[i] = found
        else:
            found = likelihood(model, rows, self.collator, task=self.task, batch_size=size).nll
            nll = np.split(found, np.cumsum([len(each) for each in choices])[:-1])
        return [
            int((-losses / np.array([len(choice.encode()) for choice in example.choices])).argmax())
            for losses, example in zip(nll, self.dataset, strict=True)
        ]

    def side_by_side(self, model: Any, progress: Callable[[int], None] | None = None) -> Evaluation:
        """Measure `model` (a PeftModel) with its adapter off (base) and on (tuned), on the same examples."""
        with model.disable_adapter():
            base = self.measure(model, progress)
        tuned = self.measure(model, progress)
        comparisons = [
            compare(before, after, resamples=self.settings.resamples)
            for before, after in zip(base.groups, tuned.groups, strict=True)
        ]
        return Evaluation(comparisons, self._predictions(base.outputs, tuned.outputs))

    def _predictions(self, base: Sequence[str], tuned: Sequence[str]) -> list[dict[str, Any]]:
        out = []
        for example, before, after in zip(self.asked or self.dataset, base, tuned, strict=False):
            if isinstance(self.encoder, LabelEncoder):
                asked: dict[str, Any] = {"text": example.text, "text_pair": example.text_pair, "label": example.label}
            elif example.choices:
                asked = {"prompt": example.prompt, "choices": example.choices, "answer": example.completion}
            else:
                asked = {"prompt": self.encoder.prompt_text(example), "references": references(example)}
            out.append({**{k: v for k, v in asked.items() if v is not None}, "base": before, "tuned": after})
        return out


def write_predictions(predictions: Sequence[dict[str, Any]]) -> str:
    """JSON lines: the prompt, the gold answers, and what base and tuned wrote."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in predictions)
