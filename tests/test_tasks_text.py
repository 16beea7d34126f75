"""Rows of one's own as texts: what is read, what the loss is taken on, what is held out, and packing."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from own_data import PAIRS, jsonl, table
from tiny_language import language, llama, small_tokenizer
from torch.nn import functional as F
from transformers import BloomConfig, BloomForCausalLM, OPTConfig, OPTForCausalLM

from svdpeft.models import Loaded
from svdpeft.tasks.classification import Classification
from svdpeft.tasks.corpora import read
from svdpeft.tasks.language import INSTRUCTION
from svdpeft.tasks.text import Text, Texts

IGNORED = -100
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
CHAT += "{% if add_generation_prompt %}<assistant>{% endif %}"
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One and one?"},
    {"role": "assistant", "content": "Two."},
    {"role": "user", "content": "And one?"},
    {"role": "assistant", "content": "Three."},
]


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def loaded() -> Loaded:
    tokenizer = copy.deepcopy(small_tokenizer())
    tokenizer.chat_template = CHAT
    return language(llama(tokenizer), tokenizer)


def folder(rows: list[Any], **others: list[Any]) -> str:
    """A folder with these rows to train on, and others; the first row is for validation where nothing is said."""
    Path("rows").mkdir()
    for split, some in {"validation": rows[:1], **others, "train": rows}.items():
        jsonl(f"rows/{split}.jsonl", some)
    return "rows"


def learned(loaded: Loaded, rows: list[Any], **options: Any) -> list[tuple[str, str]]:
    """Each training text, and what of it the loss is taken on."""
    data = Text(data=folder(rows), **options).prepare(loaded, splits=("train",))
    found = []
    for i in range(len(data.train)):  # type: ignore[arg-type]
        ids, labels = data.train[i]["input_ids"], data.train[i]["labels"]
        assert bool(((labels == ids) | (labels == IGNORED)).all())
        found.append(tuple(loaded.processor.decode(each.tolist()) for each in (ids, ids[labels != IGNORED])))
    return found


# -- what the loss is taken on -----------------------------------------------------------------------------------------


def test_the_answer_of_a_prompt(loaded):
    rows = [{"instruction": "Say a.", "output": " It is a."}, {"instruction": "Say b.", "output": ""}]
    assert learned(loaded, rows) == [("Say a. It is a.<eos>", " It is a.<eos>"), ("Say b.<eos>", "<eos>")]


@pytest.mark.parametrize(
    ("options", "text", "answer"),
    [
        ({"loss_on": "all"}, "Why? So.<eos>", "Why? So.<eos>"),
        ({"template": "Q: {prompt}\nA:"}, "Q: Why?\nA: So.<eos>", " So.<eos>"),
        ({"template": "instruction"}, INSTRUCTION.format(question="Why?") + "  So.<eos>", " So.<eos>"),
        ({"template": "chat"}, "<user>Why?</><assistant> So.</>", " So.</>"),
    ],
)
def test_templates(loaded, options, text, answer):
    assert learned(loaded, [{"prompt": "Why?", "answer": " So."}], **options) == [(text, answer)]


def test_columns_by_name(loaded):
    rows = [{"prompt": "no", "ask": "Why?", "tell": " So."}]
    assert learned(loaded, rows, prompt="ask", answer="tell") == [("Why? So.<eos>", " So.<eos>")]


def test_plain_text_is_learned_whole(loaded):
    assert learned(loaded, [{"text": "All of it."}, {"text": "And this"}]) == [
        ("All of it.<eos>", "All of it.<eos>"),
        ("And this<eos>", "And this<eos>"),
    ]


@pytest.mark.parametrize("words", [("role", "content", "assistant", "user"), ("from", "value", "gpt", "human")])
def test_every_turn_of_the_assistant_is_learned_and_nothing_else(loaded, words):
    role, content, assistant, user = words
    names = {"assistant": assistant, "user": user, "system": "system"}
    talk = [{role: names[turn["role"]], content: turn["content"]} for turn in TALK]
    written = "".join(f"<{turn['role']}>{turn['content']}</>" for turn in TALK)
    assert learned(loaded, [{"conversations": talk}]) == [(written, "Two.</>Three.</>")]


def test_of_a_conversation_all_may_be_learned(loaded):
    ((text, told),) = learned(loaded, [{"messages": TALK}], loss_on="all")
    assert text == told == "".join(f"<{turn['role']}>{turn['content']}</>" for turn in TALK)


def test_a_template_that_rewrites_the_past_is_refused(loaded):
    last = "{% for m in messages %}<{{ m.role }}>{% if loop.last %}{{ m.content }}{% endif %}</>{% endfor %}"
    loaded.processor.chat_template = last  # as those do that leave out earlier thoughts
    with pytest.raises(ValueError, match=r"row 1 of .* differently when more follows.*loss_on='all'"):
        learned(loaded, [{"messages": TALK}])


def test_no_chat_template(loaded):
    loaded.processor.chat_template = None
    with pytest.raises(ValueError, match="the tokenizer has no chat template, which conversations need: row 1 of"):
        learned(loaded, [{"messages": TALK}])


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"messages": "hello"}, "row 2 of the train split of rows: 'hello' is no message"),
        ({"messages": [{"role": "user"}]}, r"row 2 of .*{'role': 'user'} is no message"),
        ({"messages": [{"role": "user", "content": "hm"}]}, "row 2 of .* nobody is the assistant"),
        ({"messages": []}, "row 2 of .* nobody is the assistant"),
        ({"messages": None}, "row 2 of .* has nothing in column 'messages'"),
        ({"massages": TALK}, "row 2 of .* has no column 'messages': did you mean 'massages'"),
    ],
)
def test_what_is_no_conversation_is_named(loaded, row, told):
    with pytest.raises(ValueError, match=told):
        learned(loaded, [{"messages": TALK}, row])


@pytest.mark.parametrize(
    ("names", "options", "told"),
    [
        (("ask", "tell"), {}, "has the columns ask, tell: say which it is, text=COLUMN"),
        (("prompt", "tell"), {}, "has the columns prompt, tell: say which it is, answer=COLUMN"),
        (("prompt", "answer"), {"answer": "answers"}, "row 1 of .* no column 'answers': did you mean 'answer'"),
    ],
)
def test_columns_that_are_not_there(loaded, names, options, told):
    jsonl("rows.jsonl", [dict(zip(names, (f"a {i}", "b"), strict=True)) for i in range(3)])
    with pytest.raises(ValueError, match=told):
        Text(data="rows.jsonl", **options).prepare(loaded, splits=("train",))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"loss_on": "answer"}, "loss_on 'answer': did you mean 'answers'"),
        ({"template": "intsruction"}, r"template 'intsruction' has no {prompt} in it: did you mean 'instruction'"),
        ({"max_length": 1}, "max_length 1 of task 'text' is no whole number of at least 2"),
        ({"train_size": 0}, "train_size 0 of task 'text' is no whole number of at least 1"),
        ({"data": ""}, "data '' of task 'text' is no file"),
    ],
)
def test_options_out_of_range(options, told):
    with pytest.raises(ValueError, match=told):
        Text(**{"data": "rows.jsonl", **options})


# -- length ------------------------------------------------------------------------------------------------------------


def test_what_is_too_long_is_cut_and_counted():
    rows = [([1, 2, 3], [1, 2, 3]), ([1, 2, 3, 4, 5], [IGNORED] * 3 + [4, 5]), ([1, 2, 3, 4, 5], [IGNORED] * 4 + [5])]
    texts = Texts(rows, 4)
    assert [texts[i]["input_ids"].tolist() for i in range(len(texts))] == [[1, 2, 3], [1, 2, 3, 4]]
    assert [texts[i]["labels"].tolist() for i in range(len(texts))] == [[1, 2, 3], [IGNORED] * 3 + [4]]
    assert (texts.truncated, texts.dropped) == (1, 1)
    assert str(texts) == (
        "3 texts of 3 to 5 tokens, median 5; 1 cut; 1 left out, of which nothing to learn would remain"
    )
    whole = Texts(rows, None)
    assert (len(whole), whole.truncated, whole.dropped) == (3, 0, 0)
    assert Texts([([7], [7])], None).dropped == 1  # nothing comes before its only token


def test_validation_is_never_cut(loaded):
    rows = [{"text": "a long text with many words " * 3}, {"text": "another long text, as long " * 3}]
    data = Text(data=folder(rows), max_length=5).prepare(loaded, splits=("train", "validation"))
    assert {len(data.train[i]["input_ids"]) for i in range(2)} == {5}
    assert len(data.validation[0]["input_ids"]) > 20


def test_nothing_that_fits_is_an_empty_split(loaded):
    task = Text(data=folder([{"prompt": "a long prompt of many words", "answer": "b"}]), max_length=3)
    with pytest.raises(ValueError, match="the task's train split is empty"):
        task.prepare(loaded, splits=("train",))


# -- files and splits --------------------------------------------------------------------------------------------------


def test_every_format_has_the_same_rows():
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    rows = [{"prompt": 'a "quoted", word', "answer": "two\nlines"}, {"prompt": "tab\there", "answer": "wörld 你好"}]
    jsonl("rows.jsonl", rows)
    Path("rows.json").write_text(json.dumps(rows), encoding="utf-8")
    table("rows.csv", rows)
    table("rows.tsv", rows, "\t")
    parquet.write_table(pyarrow.Table.from_pylist(rows), "rows.parquet")
    for suffix in ("jsonl", "json", "csv", "tsv", "parquet"):
        assert read(Path(f"rows.{suffix}")) == rows, suffix
    Path("rows.txt").write_text("one line\n\nanother\n", encoding="utf-8-sig")
    assert read(Path("rows.txt")) == [{"text": "one line"}, {"text": "another"}]
    Path("bom.csv").write_text("text\nfirst\n", encoding="utf-8-sig")  # as spreadsheets write it
    assert read(Path("bom.csv")) == [{"text": "first"}]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.csv", "text,label\na,b\nc\n", "a.csv, line 3: 1 cells, and the first row names 2 columns: text, label"),
        ("a.csv", "text,label\na,b\nc,d,e\n", "a.csv, line 3: 3 cells, and the first row names 2"),
        ("a.csv", 'text,label\na,b\n"c,d\ne,f\n', "a.csv, the row from line 3 on: unexpected end of data"),
        ("a.jsonl", '{"a": 1}\n{"a": \n', "a.jsonl, line 2: Expecting value"),
        ("a.jsonl", "[1, 2]\n", "a.jsonl: row 1 is no JSON object but a int"),
        ("a.md", "text", "a.md is none of .json, .jsonl, .parquet, .csv, .tsv, .txt"),
        ("a.txt", b"\xff\xfe\x00", "a.txt is no text in UTF-8"),
    ],
)
def test_files_that_cannot_be_read(name, content, told):
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=told):
        read(Path(name))


def texts_of(loaded: Loaded, data: Any) -> list[str]:
    return [loaded.processor.decode(data[i]["input_ids"].tolist()) for i in range(len(data))]


def test_the_end_is_held_out_the_same_at_every_seed(loaded):
    rows = [{"text": f"text number {i}"} for i in range(60)]
    rows[3] = {"text": "Text  number 59"}  # the same text but for case and spaces
    jsonl("rows.jsonl", rows)
    task = Text(data="rows.jsonl")
    first, second = (task.prepare(loaded, seed, ("train", "validation")) for seed in (0, 1))
    held, trained = texts_of(loaded, first.validation), texts_of(loaded, first.train)
    assert held == ["text number 57<eos>", "text number 58<eos>", "text number 59<eos>"]  # one in 20
    assert trained == [f"text number {i}<eos>" for i in range(57) if i != 3]
    assert (texts_of(loaded, second.validation), texts_of(loaded, second.train)) == (held, trained)
    other = Text(data="rows.jsonl", train_size=5, validation_size=1).prepare(loaded, 0, ("train", "validation"))
    assert texts_of(loaded, other.validation) == ["text number 59<eos>"]
    assert texts_of(loaded, other.train) == [f"text number {i}<eos>" for i in (0, 1, 2, 4, 5)]


def test_published_splits_are_taken(loaded):
    data = Text(data=folder([{"text": "a"}], dev=[{"text": "b"}], test=[{"text": "c"}]))
    Path("rows", "validation.jsonl").unlink()
    found = data.prepare(loaded)
    assert [texts_of(loaded, each) for each in (found.train, found.validation, found.test)] == [
        ["a<eos>"],
        ["b<eos>"],
        ["c<eos>"],
    ]


def test_splits_that_are_not_there(loaded):
    jsonl("rows.jsonl", PAIRS)
    jsonl("empty.jsonl", [])
    jsonl("same.jsonl", PAIRS[:1] * 3)
    jsonl("one.jsonl", PAIRS[:1])
    for data, options, error, told in (
        ("rows.jsonl", {}, OSError, "it has no test split, which a folder can have; its validation split"),
        ("gone.jsonl", {}, OSError, "no file or folder 'gone.jsonl'"),
        ("empty.jsonl", {}, ValueError, "empty.jsonl has no rows"),
        ("same.jsonl", {}, ValueError, "the rows of same.jsonl all have one text"),
        ("one.jsonl", {}, ValueError, "validation_size 1 leaves nothing of the 1 rows of one.jsonl"),
        ("rows.jsonl", {"train_size": 40}, ValueError, r"train_size 40 is outside \[1, 32\], the train rows of rows"),
    ):
        splits = ("test",) if "test split" in told else ("train", "validation")
        with pytest.raises(error, match=told):
            Text(data=data, **options).prepare(loaded, 0, splits)


def test_a_label_that_no_training_row_has(loaded):
    rows = [{"text": f"{i}", "label": "ab"[i % 2]} for i in range(6)]
    task = Classification(data=folder(rows, validation=[{"text": "x", "label": "c"}]))
    assert task.num_classes == 2
    model = Loaded(loaded.model, "tiny", loaded.processor, "language", "lm_head")
    with pytest.raises(ValueError, match="row 1 of the validation split of rows has the class 'c', which no training"):
        task.prepare(model, splits=("train", "validation"))
    jsonl("one.jsonl", [{"text": f"{i}", "label": "a"} for i in range(6)])
    with pytest.raises(ValueError, match=r"column 'label' of .* has one class, 'a': nothing to tell apart"):
        _ = Classification(data="one.jsonl").num_classes
    with pytest.raises(ValueError, match=r"no column 'lable': did you mean 'label'"):
        _ = Classification(data="one.jsonl", label="lable").num_classes


# -- loss and packing --------------------------------------------------------------------------------------------------


def test_the_loss_is_that_of_each_answer(loaded):
    data = Text(data=folder(PAIRS[:5])).prepare(loaded, splits=("train",))
    found = data.evaluate(loaded.model, data.train)["loss"]
    for i, loss in enumerate(found):
        ids, labels = data.train[i]["input_ids"], data.train[i]["labels"]
        with torch.no_grad():
            logits = loaded.model(input_ids=ids[None]).logits[0]
        told = (labels != IGNORED).nonzero()[:, 0]
        assert loss == pytest.approx(F.cross_entropy(logits[told - 1].float(), ids[told]).item(), rel=1e-6)
    with pytest.raises(ValueError, match="task 'text' has no metric 'los': did you mean 'loss'"):
        data.evaluate(loaded.model, data.train, ["los"])


def test_packed_texts_have_the_loss_and_the_gradients_of_padded_ones(loaded):
    rows = [{"prompt": "Why" + " so" * i, "answer": f" It is {i}" + " really" * (5 - i)} for i in range(4)]
    padded = Text(data=folder(rows)).prepare(loaded, splits=("train",))
    packed = Text(data="rows", packing=True).prepare(loaded, splits=("train",))
    found = []
    for data in (padded, packed):
        batch = data.collate([data.train[i] for i in range(4)])
        loaded.model.zero_grad()
        labels = batch.pop("labels")
        logits = loaded.model(**batch).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
        loss.backward()
        assert loaded.model(**batch, labels=labels).loss.item() == pytest.approx(loss.item(), rel=1e-6)
        found.append((batch, loss.detach(), [p.grad.clone() for p in loaded.model.parameters()]))
    (wide, one, grads), (flat, other, others) = found
    assert flat["input_ids"].shape == (1, int(wide["attention_mask"].sum()))
    assert one.dtype == torch.float64
    torch.testing.assert_close(other, one, rtol=1e-12, atol=0)
    for a, b in zip(others, grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_the_judging_of_a_packed_task_is_that_of_a_padded_one(loaded):
    padded = Text(data=folder(PAIRS[:5])).prepare(loaded, splits=("train",))
    before = padded.evaluate(loaded.model, padded.train)
    packed = Text(data="rows", packing=True).prepare(loaded, splits=("train",))
    assert packed.evaluate(loaded.model, packed.train)["loss"] == pytest.approx(before["loss"], rel=1e-6)


@pytest.mark.parametrize("kind", ["ALiBi", "table"])
def test_a_model_that_does_not_tell_packed_texts_apart(loaded, kind):
    sizes = {"vocab_size": len(loaded.processor), "hidden_size": 16}
    if kind == "ALiBi":  # whose positions are distances, across the texts
        model = BloomForCausalLM(BloomConfig(**sizes, n_layer=1, n_head=2))
    else:
        heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 16, "word_embed_proj_dim": 16}
        model = OPTForCausalLM(OPTConfig(**sizes, **heads, max_position_embeddings=64))
    task = Text(data=folder(PAIRS[:5]), packing=True)
    with pytest.raises(ValueError, match="packing: 'tiny' does not tell packed texts apart"):
        task.prepare(language(model, loaded.processor), splits=("train",))
