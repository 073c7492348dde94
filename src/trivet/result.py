"""result.json: what a run measured, and what it was made with."""

from __future__ import annotations

import datetime
import math
import platform
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch

from trivet.adapter.attach import trainable_parameters
from trivet.adapter.layers import adapted_layers
from trivet.adapter.save import Proof
from trivet.data.marked import pieces
from trivet.evaluate.measure import Evaluation
from trivet.four_bit import count_parameters
from trivet.memory import peak_memory

#: Characters that are kept of each piece of the row that is shown.
_SAMPLE = 2000

if TYPE_CHECKING:
    from trivet.prepare import Prepared
    from trivet.train.ranks import RankCallback


def build_result(
    ready: Prepared,
    state: Any,
    ranks: RankCallback,
    tokens_per_second: float,
    proof: Proof,
    evaluation: Evaluation | None,
    which: str,
    seconds: float,
) -> dict[str, Any]:
    """Everything a run found out, as JSON values.

    Args:
        ready: the prepared run.
        state: transformers' TrainerState at the end of the training.
        ranks: what carried out the rank policy.
        tokens_per_second: trained on, without padding.
        proof: of the saved adapter.
        evaluation: of base and tuned on the split `which` (test or validation), if there was one.
        seconds: wall time of the whole run.
    """
    splits, session = ready.splits, ready.session
    measured = evaluation.to_dict() if evaluation else {"metrics": {"base": {}, "tuned": {}}, "intervals": {}, "n": {}}
    best = state.best_metric
    if best is not None and not math.isfinite(best):  # no validation gave a number
        best = None
    return {
        **measured,
        "evaluated_on": {"split": which, "source": getattr(splits, which).source} if evaluation else None,
        "learning_rate_trials": ready.trials,
        "best_validation_loss": best,
        "best_step": state.best_global_step if best is not None else None,
        "steps": state.global_step,
        "model": session.base.name,
        "task": session.base.task,
        "method": ready.config.method,
        "dtype": str(session.base.dtype).removeprefix("torch."),
        "load_in_4bit": session.base.load_in_4bit,
        "device": str(session.base.device),
        "ranks": {layer.name: layer.rank for layer in adapted_layers(session.model)},
        "rank_history": ranks.policy.history,
        "rank_seconds": round(ranks.seconds, 3),
        "adapter_parameters": ranks.parameters,
        "trainable_parameters": trainable_parameters(session.model),
        "total_parameters": count_parameters(session.model.get_base_model()),
        "tokens_per_second": round(tokens_per_second, 1),
        "peak_memory_bytes": peak_memory(),
        "wall_seconds": round(seconds, 2),
        "proof": {"relative_logit_error": proof.error, "tolerance": proof.tolerance},
        "seed": ready.config.training.seed,
        "deterministic": not (reasons := breaks_determinism(session.base.device)),
        "nondeterministic_because": reasons,
        "threads": torch.get_num_threads(),
        "data": {
            "format": splits.train.format,
            "rows": {k: len(v) for k in ("train", "validation", "test") if (v := getattr(splits, k)) is not None},
            "fingerprints": splits.fingerprints(),
            "tokens": ready.summary.tokens,
            "supervised_tokens": ready.summary.supervised,
            "shortened_rows": len(ready.summary.shortened),
            "dropped_rows": len(ready.summary.dropped),
            "skipped_rows": len(splits.train.skipped),
            "sample": [[text[:_SAMPLE], learned] for text, learned in _first_row(ready)],
        },
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("trivet", "torch", "transformers", "peft", "accelerate")},
        },
        "finished": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def breaks_determinism(device: torch.device) -> list[str]:
    """Why the same seed on the same machine may give another adapter; empty where it gives the same, to the bit."""
    if device.type == "cpu" or torch.are_deterministic_algorithms_enabled():
        return []
    return [f"kernels on {device.type} add in no fixed order; torch.use_deterministic_algorithms(True) forbids those"]


def _first_row(ready: Prepared) -> list[tuple[str, bool]]:
    """The first training row as the model sees it, in pieces that are learned or not."""
    base = ready.session.base
    classes = base.labels if base.task == "classification" else None
    return pieces(ready.train_rows[0], base.tokenizer, classes)
