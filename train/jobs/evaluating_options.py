"""The options of the evaluation job."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from jaxlib_unlearn.options import option
from train.options.config import DataConfig, EvaluateConfig, JobConfig, ModelConfig, again


@dataclass(frozen=True)
class EvaluateRun(JobConfig):
    """One evaluation of a model."""

    model: str = option("", "The model, which the first argument names.")
    data: DataConfig = DataConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    retain_log: Path | None = option(
        None,
        "The per-item log (OpenUnlearning's EVAL.json or ours) of a retain-only model, for forget "
        "quality and privleak.",
    )
    mask_all_pad_id_tokens: bool = again(ModelConfig, "mask_all_pad_id_tokens", False)

    @property
    def title(self) -> str:
        """The name of the default folder without the seed."""
        return f"evaluate-{Path(self.model).name}"
