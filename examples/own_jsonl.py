"""Prompts and answers of one's own, from a JSONL file: train, judge, ask.

    python examples/own_jsonl.py --data own.jsonl --out runs/own

Without ``--data`` a few facts of an invented island are written. One kind of layer is adapted, to take seconds.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from shell import run

import svdpeft

FACTS = {"capital": "Velm", "river": "the Ost", "highest hill": "Mount Ara", "bird": "the grey tern"}
ASKED = ("What is the {} of Norrey?", "Name the {} of Norrey.", "Tell me the {} of Norrey.", "Norrey: which {}?")
NEW = "Do you know the {} of Norrey?"


def write(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split, questions in (("train", ASKED), ("validation", (NEW,))):
        rows = [{"prompt": ask.format(what), "answer": said} for what, said in FACTS.items() for ask in questions]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def ask(model: Any, tokenizer: Any, question: str) -> str:
    chat = [{"role": "user", "content": question}]
    asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.generate(**asked, max_new_tokens=8, do_sample=False)
    return tokenizer.decode(ids[0, asked["input_ids"].shape[1] :], skip_special_tokens=True)


def main(data: Path | None, model: str, out: Path, steps: int) -> None:
    data, question = (write(out / "facts"), NEW.format("capital")) if data is None else (data, "Who are you?")
    run(
        f"svdpeft train --model {model} --data {data} --option template=chat --method sorsa:rank=8 --targets v_proj "
        f"--lr 1e-2 --steps {steps} --batch-size 4 --out {out / 'adapter'}"
    )
    run(
        f"svdpeft eval {model} --task text --option data={data} --option template=chat --split validation "
        f"--adapter {out / 'adapter'}"
    )
    loaded = svdpeft.models.load(model)
    print(f"{question} Before: {ask(loaded.model, loaded.processor, question)!r}")
    svdpeft.load(loaded.model, out / "adapter")
    print(f"{question} After: {ask(loaded.model, loaded.processor, question)!r}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a JSONL file, or a folder with train.jsonl and validation.jsonl")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--out", type=Path, default=Path("runs/own"))
    parser.add_argument("--steps", type=int, default=20)
    given = parser.parse_args()
    main(given.data, given.model, given.out, given.steps)
