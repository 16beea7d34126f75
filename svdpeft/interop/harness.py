"""EleutherAI's lm-evaluation-harness on an adapted model: any of its tasks, on the model as it is in memory.

Source: Gao et al., "The Language Model Evaluation Harness", https://github.com/EleutherAI/lm-evaluation-harness.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from svdpeft.models import Loaded
from svdpeft.registry import near_miss
from svdpeft.tasks.base import evaluating


def harness(
    loaded: Loaded,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    allow_code_execution: bool = False,
) -> dict[str, Any]:
    """Run tasks of lm-evaluation-harness on a language model, with what is attached to it.

    Args:
        loaded: a causal language model and its tokenizer, as from ``svdpeft.models.load``.
        tasks: names of the harness's tasks, groups and tags, or paths of YAML files of one's own.
        limit: examples of each task; None: all.
        num_fewshot: examples in the prompt; None: as the task says.
        batch_size: requests at once.
        allow_code_execution: let tasks run programs that the model writes. The harness runs them without a sandbox of
            ours, and wants the environment variable ``HF_ALLOW_CODE_EVAL=1`` besides.

    Returns:
        What the harness returns, whole: ``results`` (metric and standard error by task), ``samples``, ``configs``, ….

    Raises:
        ImportError: the extra ``harness`` is not installed.
        ValueError: a vision model, one without tokenizer or ``generate``, or an unknown task; with the near miss.

    Example:
        >>> harness(svdpeft.models.load("smollm2-135m"), ["lambada_openai"], limit=8)["results"]  # doctest: +SKIP
        {'lambada_openai': {'acc,none': 0.5, …}}
    """
    if loaded.modality != "language" or not callable(getattr(loaded.model, "generate", None)):
        raise ValueError(f"lm-evaluation-harness is for causal language models, which {loaded.name!r} is not")
    if loaded.processor is None:
        raise ValueError(f"lm-evaluation-harness needs a tokenizer; {loaded.name!r} has none")
    try:
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        raise ImportError('lm-evaluation-harness is the extra harness: pip install "svdpeft[harness]"') from error
    named = [task for task in tasks if not Path(task).is_file()]
    manager = TaskManager(include_defaults=bool(named))  # to look through its 14,000 tasks takes seconds
    for task in named:
        if task not in manager.task_index:
            raise ValueError(f"lm-evaluation-harness has no task {task!r}: {near_miss(task, manager.all_tasks)}")
    wrapped: dict[str, Any] = {
        "pretrained": loaded.model,
        "backend": "causal",
        "tokenizer": loaded.processor,
        "batch_size": batch_size,
    }
    with evaluating(loaded.model):
        found = simple_evaluate(
            HFLM(**wrapped),
            tasks=list(tasks),
            limit=limit,
            num_fewshot=num_fewshot,
            task_manager=manager,
            confirm_run_unsafe_code=allow_code_execution,
        )
    assert found is not None  # only on other ranks of a distributed run
    return dict(found)
