"""``svdpeft eval``."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Table

from svdpeft.cli.app import Json, Quantize, TaskName, TaskOptions, app, console, fail, quiet
from svdpeft.cli.completion import model_names

Split = Literal["train", "validation", "test"]
Dtype = Literal["float32", "bfloat16", "float16"]


@app.command("eval")
def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            help="Embedded name, timm:NAME, hf:NAME, a local folder or an RWKV file.", autocompletion=model_names
        ),
    ],
    adapter: Annotated[Path | None, typer.Option(help="Folder of a saved adapter.")] = None,
    task: TaskName = None,
    option: TaskOptions = None,
    split: Annotated[Split | None, typer.Option(help="Part of the task's data; test unless said.")] = None,
    harness: Annotated[
        str | None, typer.Option(help="Tasks of lm-evaluation-harness instead: names or YAML files, with commas.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Examples of each task of the harness; of a --task: --option test_size=.", min=1)
    ] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="Examples in the harness's prompts.", min=0)] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Requests of the harness at once, 8; of a --task: --option decode_batch=.", min=1)
    ] = None,
    image_size: Annotated[int | None, typer.Option(help="Side of the input in pixels (vision).")] = None,
    dtype: Annotated[
        Dtype, typer.Option(help="Of the weights; an adapter needs the one it was trained in.")
    ] = "float32",
    quantize: Quantize = None,
    merged: Annotated[
        bool, typer.Option("--merged", help="Evaluate with the adapter merged into the weights.")
    ] = False,
    allow_code_execution: Annotated[
        bool,
        typer.Option(
            "--allow-code-execution",
            help="Run programs that the model writes: in a sandbox with --task, WITHOUT a sandbox with --harness.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Evaluate a model, with or without an adapter, on one of svdpeft's tasks or those of lm-evaluation-harness."""
    quiet()
    about = {"model": model, "adapter": str(adapter) if adapter else None, "merged": merged, "dtype": dtype}
    about |= {} if quantize is None else {"quantize": quantize}
    try:
        if (task is None) == (harness is None):
            raise ValueError("give one of --task and --harness")
        instead = {"--limit": ": give --option test_size=", "--batch-size": ": give --option decode_batch="}
        other = (
            {"--option": option, "--split": split, "--image-size": image_size}
            if harness
            else {"--limit": limit, "--num-fewshot": num_fewshot, "--batch-size": batch_size}
        )
        if given := [name for name, value in other.items() if value not in (None, [])]:
            goes = "--task" if harness else f"--harness{instead.get(given[0], '')}"
            raise ValueError(f"{given[0]} goes with {goes}")
        if merged and adapter is None:
            raise ValueError("--merged merges an adapter: give its folder with --adapter")
        if harness is not None:
            from svdpeft.interop.harness import harness as run

            loaded = _load(model, adapter, merged, None, image_size, dtype, quantize)
            found = run(
                loaded,
                [name.strip() for name in harness.split(",")],
                limit=limit,
                num_fewshot=num_fewshot,
                batch_size=batch_size or 8,
                allow_code_execution=allow_code_execution,
            )
            _print_harness(about, found, as_json)
        else:
            from svdpeft.finetuning.words import read_values
            from svdpeft.registry import TASKS

            options = read_values(option or []) | ({"allow_code_execution": True} if allow_code_execution else {})
            chosen = TASKS.make(str(task), options)
            if chosen.num_classes is not None and adapter is None:
                raise ValueError(
                    f"task {task!r} puts a new head of {chosen.num_classes} classes on {model!r}, "
                    "which only an adapter has trained: give its folder with --adapter"
                )
            part = split or "test"
            loaded = _load(model, adapter, merged, chosen.num_classes, image_size, dtype, quantize)
            data = chosen.prepare(loaded, splits=(part,))
            items = data.evaluate(loaded.model, getattr(data, part))
            _print_task({**about, "task": {"name": task, **options}, "split": part}, items, as_json)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        fail(error)


def bounds(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """A confidence interval for the mean over all examples that these are a sample of.

    Wilson's where every value is 0 or 1, which stays inside [0, 1] and right for few examples; Student's t for others.

    Args:
        values: one per example.
        confidence: of the interval.

    Returns:
        Its ends; NaN where one value of a loss is all there is.

    Example:
        >>> [round(end, 3) for end in bounds([1.0, 1.0, 0.0, 1.0])]
        [0.301, 0.954]

    Source: Wilson, "Probable inference, the law of succession, and statistical inference", JASA 1927.
    """
    from scipy.stats import binomtest

    from svdpeft.compare.statistics import interval

    if set(values) <= {0.0, 1.0}:
        ends = binomtest(int(sum(values)), len(values)).proportion_ci(confidence, method="wilson")
        return float(ends.low), float(ends.high)
    ends = interval(values, confidence)
    return ends.low, ends.high


def _load(
    model: str,
    adapter: Path | None,
    merged: bool,
    num_classes: int | None,
    image_size: int | None,
    dtype: Dtype,
    quantize: str | None,
) -> Any:
    import torch

    import svdpeft
    from svdpeft.adapter.file import CheckpointError
    from svdpeft.models import load

    precision = getattr(torch, dtype)
    loaded: Any = load(model, num_classes=num_classes, image_size=image_size, dtype=precision, quantize=quantize)
    if adapter is not None:
        try:
            attached = svdpeft.load(loaded.model, adapter)
        except CheckpointError as error:
            if error.dtype:
                raise ValueError(
                    f"{adapter} was made for weights in {error.dtype}: give --dtype {error.dtype}"
                ) from error
            raise
        trained = {id(parameter) for parameter in attached.parameters()}
        if num_classes is not None and not trained & {
            id(p) for p in loaded.model.get_submodule(loaded.head).parameters()
        }:
            raise ValueError(f"{adapter} has not trained {loaded.head!r}, the new head of {num_classes} classes")
        if merged:
            attached.merge(dtype=None if quantize is None else precision)
    loaded.model.to("cuda" if torch.cuda.is_available() else "cpu")
    return loaded


def _print_task(about: dict[str, Any], items: dict[str, list[float]], as_json: bool) -> None:
    found = {}
    for name, values in items.items():
        low, high = (None if math.isnan(end) else end for end in bounds(values))
        found[name] = {"value": sum(values) / len(values), "low": low, "high": high, "examples": len(values)}
    if as_json:
        print(json.dumps({**about, "metrics": found, "items": items}, default=str))
        return
    table = Table(box=None, padding=(0, 1, 0, 0))
    for title in ("metric", "value", "95 % interval", "examples"):
        table.add_column(title, justify="left" if title == "metric" else "right", no_wrap=True)
    for name, one in found.items():
        span = "–" if one["low"] is None else f"{one['low']:.4f} … {one['high']:.4f}"
        table.add_row(name, f"{one['value']:.4f}", span, str(one["examples"]))
    console.print(table)


def _print_harness(about: dict[str, Any], found: dict[str, Any], as_json: bool) -> None:
    from lm_eval.utils import handle_non_serializable, make_table

    if as_json:
        print(json.dumps({**about, "harness": found}, default=handle_non_serializable))
    else:
        print(make_table(found))  # not through rich, which would break its lines
