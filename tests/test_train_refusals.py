"""What ``svdpeft train`` refuses: with a message that says what is wrong, before anything is written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from own_data import command, jsonl, place, saved_models
from PIL import Image
from typer.testing import CliRunner

from svdpeft.cli import app

__all__ = ["place", "saved_models"]  # fixtures
TALK = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]

REFUSED = [
    # What is asked for
    ({"model": None}, "a training needs a model: --model"),
    ({"method": None}, "a training needs a method: --method"),
    ({"data": None}, "a training needs --data of your own, or a --task"),
    ({"model": "nonsense"}, "no model is called 'nonsense'"),
    ({"method": "pisa"}, "no method is called 'pisa': did you mean 'pissa'"),
    ({"method": "pissa:rnk=2"}, "no hyper-parameter 'rnk': did you mean 'rank'"),
    ({"method": "pissa:rank"}, "'rank': write an option as key=value"),
    ({"task": "txt"}, "no task is called 'txt': did you mean 'text'"),
    ({"option": ["tempalte=plain"]}, "no hyper-parameter 'tempalte': did you mean 'template'"),
    ({"option": ["template"]}, "'template': write an option as key=value"),
    (
        {"option": ["prompt=promt"]},
        "row 1 of the train split of own.jsonl has no column 'promt': did you",
    ),
    ({"targets": ["q_prj"]}, "targets='q_prj' matches no weight of the model: did you mean 'q_proj'"),
    ({"exclude": ["q_prj"]}, "exclude='q_prj' matches nothing in the model"),
    ({"train": ["nrm"]}, "train='nrm' names no parameter"),
    # Numbers
    ({"lr": -1.0}, "lr -1.0 is not a finite number above 0"),
    ({"epochs": 0}, "epochs 0.0 is not a finite number above 0"),
    ({"batch_size": 0}, "batch_size 0 is not a whole number of at least 1"),
    ({"steps": 0}, "steps 0 is not a whole number of at least 1"),
    ({"warmup": 1.5}, "warmup 1.5 is neither a share of the steps below 1 nor a number of them"),
    ({"clip": -1.0}, "clip -1.0 is not a finite number of at least 0"),
    ({"head_lr": -1.0}, "head_lr -1.0 is not a finite number above 0"),
    ({"seed": -1}, "seed -1 is no whole number in [0, 2^32)"),
    ({"eval_every": -1}, "eval_every -1 is no whole number of steps"),
    ({"save_every": -3}, "save_every -3 is no whole number of steps"),
    ({"length": 1}, "max_length 1 of task 'text' is no whole number of at least 2"),
    ({"dtype": "bf16"}, "dtype 'bf16': did you mean 'bfloat16'"),
    ({"scheduler": "cosin"}, "scheduler 'cosin': did you mean 'cosine'"),
    ({"mixed_precision": "bfloat16"}, "mixed_precision 'bfloat16': did you mean 'bf16'"),
    ({"image_size": 32}, "image_size=32 is for vision models; 'tiny' is a language model"),
    ({"tracker": "tensorbord"}, "tracker 'tensorbord' is not one that transformers knows: did you mean 'tensorboard'"),
    # Models and tasks that do not go together
    ({"task": "images", "data": "pictures"}, "task 'images' is for vision models, but 'tiny' is a language model"),
    ({"model": "bert"}, "task 'text' needs a model that continues texts; 'bert' has no generate()"),
    ({"model": "bert", "task": "classification"}, "has the columns prompt, answer: say which it is, label=COLUMN"),
    ({"task": "wordproblems"}, "wordproblems has no hyper-parameter 'data'"),
    # Data
    ({"data": "gone.jsonl"}, "no file or folder 'gone.jsonl'"),
    ({"data": "empty.jsonl"}, "empty.jsonl has no rows"),
    ({"data": "columns.jsonl"}, "has the columns ask, tell: say which it is, text=COLUMN"),
    ({"data": "cells.csv"}, "cells.csv, line 3: 3 cells, and the first row names 2 columns: prompt, answer"),
    ({"data": "quotes.csv"}, "quotes.csv, the row from line 3 on: unexpected end of data"),
    ({"data": "talk.jsonl"}, "row 2 of the train split of talk.jsonl: 'hello' is no message"),
    ({"data": "nothing"}, "no train split in 'nothing'"),
    ({"data": "order.toml"}, "order.toml is none of .json, .jsonl, .parquet, .csv, .tsv, .txt"),
]


@pytest.mark.parametrize(("options", "told"), REFUSED, ids=[told[:40] for _, told in REFUSED])
def test_it_says_what_is_wrong_and_writes_nothing(options, told, place):
    Path("nothing").mkdir()
    for name in "ab":
        Path("pictures", name).mkdir(parents=True)
        for i in range(6):
            Image.new("RGB", (8, 8)).save(f"pictures/{name}/{i}.png")
    Path("order.toml").touch()
    Path("empty.jsonl").touch()
    Path("cells.csv").write_text("prompt,answer\na,b\nc,d,e\n")
    Path("quotes.csv").write_text('prompt,answer\na,b\n"c,d\n')
    jsonl("columns.jsonl", [{"ask": f"a {i}", "tell": "b"} for i in range(3)])
    jsonl("talk.jsonl", [{"messages": TALK}, {"messages": "hello"}, {"messages": [*TALK, *TALK]}])
    before = sorted(os.listdir())
    result = command(code=2, **options)
    assert result.stderr.startswith("svdpeft: ")
    assert told in result.stderr
    assert sorted(os.listdir()) == before


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('model = "tiny"\nmethdo = "pissa"\n', "order.toml: a training has no option 'methdo': did you mean 'method'"),
        ('model = "tiny\n', "order.toml: Illegal character"),
        ("model = 3\n", "model = 3 is no text"),
        ('model = "tiny"\nmethod = "pissa"\ndata = ["own.jsonl"]\n', "data = ['own.jsonl'] is no text"),
        ('model = "tiny"\nmethod = "pissa"\ndata = "own.jsonl"\nseed = 1.5\n', "seed 1.5 is no whole number"),
        ('model = "tiny"\nmethod = "pissa"\ndata = "own.jsonl"\nlr = "1e-3"\n', "lr '1e-3' is not a finite number"),
        ('model = "tiny"\nmethod = "pissa"\ndata = "own.jsonl"\nhead_lr = "high"\n', "head_lr 'high' is not"),
        *(
            (
                f'model = "tiny"\nmethod = "pissa"\ndata = "own.jsonl"\n{name} = 1{"0" * 400}\n',
                "00 is not a finite number",
            )
            for name in ("lr", "epochs", "head_lr", "loraplus_ratio")
        ),
        ('model = "tiny"\nmethod = "pissa"\ndata = "own.jsonl"\ntargets = 3\n', "targets = 3 is no pattern"),
        ('model = "tiny"\nmethod = "pissa"\ndata = "own.jsonl"\noption = 3\n', "option = 3 is no table"),
    ],
)
def test_a_file_that_is_wrong(text, told, place):
    Path("order.toml").write_text(text)
    result = CliRunner().invoke(app, ["train", "order.toml"])
    assert result.exit_code == 2, result.output
    assert told in result.stderr


def test_a_file_that_is_not_there(place):
    result = CliRunner().invoke(app, ["train", "gone.toml"])
    assert result.exit_code == 2
    assert "gone.toml" in result.stderr
