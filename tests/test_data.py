"""Calibration and evaluation tokens against text small enough to check by eye."""

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lowbit.data import (
    Calibration,
    DataSpec,
    calibration_tokens,
    evaluation_tokens,
    passages,
    read_documents,
    written_tokens,
)

BOS, EOS, PAD = 0, 1, 2
BYTE = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()), start=3)}
VOCAB = 3 + len(BYTE)  # 259


def byte_tokenizer(*, template: bool = False, **special: str) -> PreTrainedTokenizerFast:
    """One token a byte; with `template`, the tokenizer itself adds bos and eos when asked for special tokens."""
    core = Tokenizer(models.BPE(vocab={"<s>": BOS, "</s>": EOS, "<pad>": PAD, **BYTE}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if template:
        core.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)])
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte tokenizer with all three special tokens."""
    return byte_tokenizer(bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def ids(text: str) -> list[int]:
    """The ids of ASCII text, without the tokenizer."""
    return [BYTE[{" ": "Ġ", "\n": "Ċ"}.get(character, character)] for character in text]


def write_jsonl(path: Path, texts: list[str], key: str = "text") -> str:
    """One object a line; returns the path as a source."""
    path.write_text("".join(json.dumps({"source": "x", key: text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


def split_stream(stream: list[int]) -> list[list[int]]:
    """Cut `bos text eos bos text eos ...` into its texts; whatever is not of that form fails."""
    texts = []
    while stream:
        assert stream[0] == BOS
        end = stream.index(EOS) if EOS in stream else len(stream)
        texts.append(stream[1:end])
        assert BOS not in texts[-1]
        stream = stream[end + 1 :]
    return texts


# ----------------------------------------------------------------------------------------------------------------- spec
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "text.csv"}, "no known kind"),
        ({"source": ""}, "no known kind"),
        ({"source": Path("a.txt")}, "not a string"),
        ({"source": "hf:"}, "does not name a dataset"),
        ({"source": "hf:a:"}, "does not name a dataset"),
        ({"source": "hf:a:b:c"}, "does not name a dataset"),
        ({"source": "random", "rows": 0}, "rows = 0.*at least 1"),
        ({"source": "random", "rows": True}, "rows = True"),
        ({"source": "random", "rows": 2.0}, "rows = 2.0"),
        ({"source": "random", "length": 1}, "length = 1.*at least 2"),
        ({"source": "random", "seed": -1}, "seed = -1.*at least 0"),
        ({"source": "a.jsonl", "text_key": ""}, "text_key = ''"),
        ({"source": "hf:a", "split": ""}, "split = ''"),
    ],
)
def test_spec_refuses(options: dict[str, Any], message: str) -> None:
    """Every field is checked when the spec is made."""
    with pytest.raises(ValueError, match=message):
        DataSpec(**options)


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("a.txt", "txt"),
        ("b/c.JSONL", "jsonl"),
        ("hf:org/name:config", "hub"),
        ("hf:name", "hub"),
        ("random", "random"),
        ("self", "self"),
    ],
)
def test_spec_kind(source: str, kind: str) -> None:
    """The kind follows from the source alone; no file is looked for."""
    assert DataSpec(source=source).kind == kind


# ------------------------------------------------------------------------------------------------------------ documents
def test_read_documents_in_order(tmp_path: Path) -> None:
    """A line is a document, a .txt file is one document, and blank lines, a byte-order mark and U+2028 do no harm."""
    texts = ["first", "", "third\u2028with a line separator", "vier\nZeilen"]
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    path.write_text("\ufeff" + "\n\n".join(lines), encoding="utf-8")
    assert list(read_documents(DataSpec(source=str(path)))) == texts
    (tmp_path / "b.txt").write_text("\ufeffone\n\ntwo\n", encoding="utf-8")
    assert list(read_documents(DataSpec(source=str(tmp_path / "b.txt")))) == ["one\n\ntwo\n"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "holds no text"),
        ("a.txt", b" \n\n", "holds no text"),
        ("a.txt", b"abc\xff", "not UTF-8 at byte 3"),
        ("a.jsonl", b"", "holds no documents"),
        ("a.jsonl", b"\n\n", "holds no documents"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": \n', "line 3 is not valid JSON"),
        ("a.jsonl", b'{"text": "a"}\n["b"]\n', "line 2 is a JSON list"),
        ("a.jsonl", b'{"text": "a"}\n{"body": "b", "about": 1}\n', r"line 2 has no key 'text'.*\['about', 'body'\]"),
        ("a.jsonl", b'{"text": 7}\n', "line 1: key 'text' holds a int, not a string"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "line 2 is not UTF-8"),
    ],
)
def test_read_documents_refuses(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    """A broken file is named with its line."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(read_documents(DataSpec(source=str(tmp_path / name))))


def test_read_documents_missing(tmp_path: Path) -> None:
    """A missing file is reported at once, not when the first document is asked for."""
    with pytest.raises(ValueError, match="is not a file"):
        read_documents(DataSpec(source=str(tmp_path / "no.txt")))
    with pytest.raises(ValueError, match="'random' has no text"):
        read_documents(DataSpec(source="random"))


# ------------------------------------------------------------------------------------------------------------- passages
@given(st.text(alphabet="ab \n", max_size=200), st.integers(1, 50))
def test_passages_lose_no_text(text: str, characters: int) -> None:
    """All text is in some passage, in order, and none is too long or blank."""
    cut = passages(text, characters)
    assert "".join(cut).replace("\n", "").replace(" ", "") == text.replace("\n", "").replace(" ", "")
    assert all(0 < len(piece) <= characters and piece.strip() for piece in cut)


def test_passages_end_where_they_should() -> None:
    """At a newline, else at a space, else anywhere."""
    assert passages("aaa\nbbb\nccc\n", 8) == ["aaa\nbbb", "ccc"]
    assert passages("aaa\nbbb\nccc\n", 7) == ["aaa", "bbb", "ccc"]
    assert passages("aaa bbb ccc", 8) == ["aaa bbb ", "ccc"]
    assert passages("aaaaabbbbb", 4) == ["aaaa", "abbb", "bb"]


# ---------------------------------------------------------------------------------------------------------- calibration
def test_packing(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Documents are whole, each once, in a shuffled order, end to end as bos text eos; empty ones are skipped."""
    texts = [f"document {n} " + "x" * n for n in range(20)]
    source = write_jsonl(tmp_path / "a.jsonl", [*texts[:7], "", " \n", *texts[7:]])
    total = sum(len(text) + 2 for text in texts)
    drawn = calibration_tokens(DataSpec(source=source, rows=total // 10, length=10), tokenizer, vocab_size=VOCAB)
    assert drawn.tokens.shape == (total // 10, 10)
    assert drawn.tokens.dtype == torch.int64
    found = split_stream(drawn.tokens.flatten().tolist())
    *whole, last = found
    encoded = [ids(text) for text in texts]
    assert all(text in encoded for text in whole)
    assert any(text[: len(last)] == last for text in encoded)
    assert len({tuple(text) for text in found}) == len(found) == drawn.documents == 20
    assert found[:5] != encoded[:5]


def test_packing_whole_source(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """The last token of the last document can be used, one more is refused with what there is and what to do."""
    source = write_jsonl(tmp_path / "a.jsonl", ["abcd", "efgh"])
    drawn = calibration_tokens(DataSpec(source=source, rows=2, length=6), tokenizer, vocab_size=VOCAB)
    assert sorted(drawn.tokens.tolist()) == sorted([[BOS, *ids("abcd"), EOS], [BOS, *ids("efgh"), EOS]])
    with pytest.raises(ValueError, match="12 tokens in 2 documents, but 3 rows of 5 need 15: use rows <= 2, a shorter"):
        calibration_tokens(DataSpec(source=source, rows=3, length=5), tokenizer, vocab_size=VOCAB)


@pytest.mark.parametrize(
    ("special", "template", "expected"),
    [
        ({"bos_token": "<s>", "eos_token": "</s>"}, False, [BOS, *ids("ab"), EOS] * 2),
        ({"bos_token": "<s>", "eos_token": "</s>"}, True, [BOS, *ids("ab"), EOS] * 2),
        ({"eos_token": "</s>"}, True, [*ids("ab"), EOS] * 2),
        ({"bos_token": "<s>"}, True, [BOS, *ids("ab")] * 2),
        ({"bos_token": "</s>", "eos_token": "</s>"}, False, [EOS, *ids("ab")] * 2),
        ({}, False, ids("ab") * 2),
    ],
)
def test_boundaries(tmp_path: Path, special: dict[str, str], template: bool, expected: list[int]) -> None:
    """Each boundary id once, whether or not the tokenizer would add it; none that the tokenizer lacks."""
    source = write_jsonl(tmp_path / "a.jsonl", ["ab", "ab"])
    tokenizer = byte_tokenizer(template=template, **special)
    assert evaluation_tokens(source, tokenizer).tolist() == expected
    spec = DataSpec(source=source, rows=1, length=len(expected))
    drawn = calibration_tokens(spec, tokenizer, vocab_size=VOCAB)
    assert drawn.tokens.tolist() == [expected]
    assert (drawn.bos_id in expected, drawn.eos_id in expected) == (
        "bos_token" in special,
        "eos_token" in special and special.get("bos_token") != special["eos_token"],
    )


def test_boundaries_in_the_text(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """A text that spells out its boundaries does not get them twice."""
    source = write_jsonl(tmp_path / "a.jsonl", ["<s>ab</s>", "cd"])
    assert evaluation_tokens(source, tokenizer).tolist() == [BOS, *ids("ab"), EOS, BOS, *ids("cd"), EOS]


def test_txt_is_sampled_in_passages(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """A long .txt file is not read from its beginning on, and no more of it is encoded than needed."""
    path = tmp_path / "a.txt"
    path.write_text("".join(f"line {n:06d}\n" for n in range(100_000)), encoding="utf-8")  # 1.2 MB, ~300 passages
    encoded = 0

    def counted(text: str, **options: Any) -> Any:
        nonlocal encoded
        encoded += len(text)
        return tokenizer(text, **options)

    spy: Any = type("Spy", (), {"bos_token_id": BOS, "eos_token_id": EOS, "__call__": staticmethod(counted)})()
    spec = DataSpec(source=str(path), rows=40, length=500)
    drawn = calibration_tokens(spec, spy, vocab_size=VOCAB)
    starts = [bytes_of(text)[:11] for text in split_stream(drawn.tokens.flatten().tolist())]
    numbers = [int(start.removeprefix("line ")) for start in starts]
    assert numbers != sorted(numbers)
    assert max(numbers) - min(numbers) > 20_000
    assert drawn.documents == len(numbers) == 5  # 20,000 tokens in passages of 4,096
    assert encoded < 6 * 4096


def bytes_of(text: list[int]) -> str:
    """The inverse of `ids`."""
    character = {index: key for key, index in BYTE.items()}
    return "".join({"Ġ": " ", "Ċ": "\n"}.get(character[index], character[index]) for index in text)


def test_same_seed_same_tokens(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """The draw follows from the seed; the hash follows from the tokens."""
    source = write_jsonl(tmp_path / "a.jsonl", [f"text number {n}" for n in range(30)])

    def draw(seed: int) -> Calibration:
        return calibration_tokens(DataSpec(source=source, rows=4, length=16, seed=seed), tokenizer, vocab_size=VOCAB)

    assert torch.equal(draw(3).tokens, draw(3).tokens)
    assert draw(3).sha256 == draw(3).sha256 != draw(4).sha256
    raw = b"".join(value.to_bytes(8, "little") for value in draw(3).tokens.flatten().tolist())
    assert draw(3).sha256 == hashlib.sha256(raw).hexdigest()


def test_order_is_stable(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """The order of documents is part of what a recipe promises, across versions and machines."""
    source = write_jsonl(tmp_path / "a.jsonl", [f"{n}" for n in range(8)])
    drawn = calibration_tokens(DataSpec(source=source, rows=8, length=3), tokenizer, vocab_size=VOCAB)
    assert [bytes_of(row[1:2]) for row in drawn.tokens.tolist()] == list("41520376")


def test_describe(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """A record in JSON types that names the file without its folder."""
    source = write_jsonl(tmp_path / "a.jsonl", ["abcd"], key="body")
    spec = DataSpec(source=source, rows=1, length=4, text_key="body", seed=9)
    drawn = calibration_tokens(spec, tokenizer, vocab_size=VOCAB)
    assert json.loads(json.dumps(drawn.describe())) == {
        "source": "a.jsonl",
        "source_sha256": hashlib.sha256(Path(source).read_bytes()).hexdigest(),
        "text_key": "body",
        "split": None,
        "rows": 1,
        "length": 4,
        "seed": 9,
        "documents": 1,
        "bos_id": BOS,
        "eos_id": EOS,
        "tokens_sha256": drawn.sha256,
    }


def test_text_needs_its_tokenizer(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """No tokenizer, or one of another model, is refused with the remedy."""
    source = write_jsonl(tmp_path / "a.jsonl", ["abz"])
    spec = DataSpec(source=source, rows=1, length=4)
    with pytest.raises(ValueError, match="no tokenizer: load the model's tokenizer"):
        calibration_tokens(spec, None, vocab_size=VOCAB)
    assert calibration_tokens(spec, tokenizer, vocab_size=BYTE["z"] + 1).tokens.max() == BYTE["z"]
    with pytest.raises(ValueError, match=rf"id {BYTE['z']} \('z'\), but the model has vocab_size {BYTE['z']}"):
        calibration_tokens(spec, tokenizer, vocab_size=BYTE["z"])
    with pytest.raises(ValueError, match="vocab_size = 0"):
        calibration_tokens(spec, tokenizer, vocab_size=0)


# --------------------------------------------------------------------------------------------------------------- random
def test_random_tokens_are_stable() -> None:
    """The seeded ids are the same everywhere."""
    drawn = calibration_tokens(DataSpec(source="random", rows=4, length=8, seed=1), None, vocab_size=1000)
    assert drawn.tokens[0].tolist() == [845, 139, 124, 368, 263, 313, 491, 341]
    assert drawn.sha256 == "a5860ee17d7e6789faa1d76eaddfaf7c48f22db885764405b6f34b533935b5ed"
    assert drawn.describe()["source"] == "random"
    assert drawn.documents == 0


def test_random_tokens_are_uniform(tokenizer: PreTrainedTokenizerFast) -> None:
    """All ids without a tokenizer; with one, neither special ids nor ids it does not have."""
    spec = DataSpec(source="random", rows=100, length=200)
    every = calibration_tokens(spec, None, vocab_size=50).tokens
    assert every.shape == (100, 200)
    assert set(every.flatten().tolist()) == set(range(50))
    counts = torch.bincount(every.flatten())
    assert counts.min() > 300
    assert counts.max() < 500  # 400 expected, standard deviation 20
    known = calibration_tokens(spec, tokenizer, vocab_size=VOCAB + 41).tokens
    assert set(known.flatten().tolist()) == set(range(3, VOCAB))
    fewer = calibration_tokens(spec, tokenizer, vocab_size=20).tokens
    assert set(fewer.flatten().tolist()) == set(range(3, 20))
    with pytest.raises(ValueError, match="special ids only"):
        calibration_tokens(spec, tokenizer, vocab_size=3)


# ----------------------------------------------------------------------------------------------------------- evaluation
def test_evaluation_tokens(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """A .txt file is one string without special tokens, .jsonl documents keep file order and have boundaries."""
    text = "one\n\n two three\n"
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    whole = evaluation_tokens(str(tmp_path / "a.txt"), tokenizer)
    assert whole.dtype == torch.int64
    assert whole.tolist() == ids(text)
    adding = byte_tokenizer(template=True, bos_token="<s>", eos_token="</s>")
    assert evaluation_tokens(str(tmp_path / "a.txt"), adding).tolist() == ids(text)
    source = write_jsonl(tmp_path / "a.jsonl", ["one", "", "two"], key="body")
    stream = [BOS, *ids("one"), EOS, BOS, *ids("two"), EOS]
    assert evaluation_tokens(source, tokenizer, text_key="body").tolist() == stream
    assert evaluation_tokens(source, tokenizer, text_key="body", limit=7).tolist() == stream[:7]
    assert evaluation_tokens(source, tokenizer, text_key="body", join="\n\n").tolist() == ids("one\n\n\n\ntwo")


def test_evaluation_tokens_refuses(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Nothing to encode, or nothing asked for."""
    source = write_jsonl(tmp_path / "a.jsonl", ["", " "])
    with pytest.raises(ValueError, match="encodes to no tokens"):
        evaluation_tokens(source, tokenizer)
    with pytest.raises(ValueError, match="limit = 0"):
        evaluation_tokens(source, tokenizer, limit=0)
    with pytest.raises(ValueError, match="'random' has no text"):
        evaluation_tokens("random", tokenizer)


# ------------------------------------------------------------------------------------------------------------------ hub
class Rows:
    """Stands for `datasets.IterableDataset`."""

    def __init__(self, records: list[dict[str, Any]]) -> None:
        self.records = records

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.records)

    def shuffle(self, *, seed: int, buffer_size: int) -> "Rows":
        assert buffer_size > 1
        return Rows(self.records[seed:] + self.records[:seed])


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A `datasets` with one dataset; the list collects what was asked of it."""
    asked: list[tuple[Any, ...]] = []

    def load_dataset(name: str, config: str | None, *, split: str, streaming: bool) -> Rows:
        asked.append((name, config, split, streaming))
        if name != "org/name":
            raise FileNotFoundError(f"Dataset '{name}' doesn't exist on the Hub")
        if split == "nowhere":
            raise ValueError("Bad split: nowhere")
        return Rows([{"text": letter * 2, "number": 1} for letter in "abcd"])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return asked


def test_hub(hub: list[tuple[Any, ...]], tokenizer: PreTrainedTokenizerFast) -> None:
    """Dataset, config and split reach the library; calibration shuffles with its seed, evaluation does not."""
    spec = DataSpec(source="hf:org/name:config", rows=2, length=4, seed=1)
    drawn = calibration_tokens(spec, tokenizer, vocab_size=VOCAB)
    assert drawn.tokens.tolist() == [[BOS, *ids("bb"), EOS], [BOS, *ids("cc"), EOS]]
    assert drawn.describe()["source"] == "hf:org/name:config"
    assert drawn.describe()["source_sha256"] is None
    assert evaluation_tokens("hf:org/name", tokenizer, join="").tolist() == ids("aabbccdd")
    assert hub == [("org/name", "config", "train", True), ("org/name", None, "test", True)]


def test_hub_refuses(hub: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    """What the user named wrongly is in the message; without the library it says what to install."""
    with pytest.raises(ValueError, match=r"'hf:org/other' .* does not open .*doesn't exist"):
        read_documents(DataSpec(source="hf:org/other"))
    with pytest.raises(ValueError, match="split 'nowhere' does not open"):
        read_documents(DataSpec(source="hf:org/name", split="nowhere"))
    with pytest.raises(ValueError, match=r"row 1 has no key 'body'.*\['number', 'text'\]"):
        list(read_documents(DataSpec(source="hf:org/name", text_key="body")))
    with pytest.raises(ValueError, match="row 1: key 'number' holds a int"):
        list(read_documents(DataSpec(source="hf:org/name", text_key="number")))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'lowbit\[data\]'"):
        read_documents(DataSpec(source="hf:org/name"))


# ---------------------------------------------------------------------------------------------------------------- written
def test_written_tokens_follow_the_model(tmp_path: Path) -> None:
    """Drawn from the model's own distribution: frequent where it gives much probability, and the same for the same seed."""
    model = tiny.save("llama", tmp_path, dtype=torch.float32, seed=1)
    spec = DataSpec(source="self", rows=40, length=12, seed=3)
    rows = written_tokens(spec, model, None, vocab_size=tiny.VOCAB)
    assert rows.shape == (40, 12) and rows.dtype == torch.int64
    state = torch.random.get_rng_state()
    assert torch.equal(rows, written_tokens(spec, model, None, vocab_size=tiny.VOCAB))
    assert torch.equal(state, torch.random.get_rng_state())
    other = DataSpec(source="self", rows=40, length=12, seed=4)
    assert not torch.equal(rows, written_tokens(other, model, None, vocab_size=tiny.VOCAB))
    assert len(set(rows[:, 0].tolist())) > 20  # rows begin at random
    with torch.no_grad():
        logits = torch.log_softmax(model(rows).logits[:, :-1], -1)
    mean = logits.gather(-1, rows[:, 1:, None]).mean()
    entropy = -(logits.exp() * logits).sum(-1).mean()
    assert abs(float(mean + entropy)) < 0.1 * float(entropy)  # the mean log-likelihood of a draw is minus the entropy


def test_written_tokens_begin_with_bos(tmp_path: Path) -> None:
    model = tiny.save("llama", tmp_path, dtype=torch.float32, seed=1)
    tokenizer = tiny.save_tokenizer(tmp_path)
    spec = DataSpec(source="self", rows=3, length=5)
    rows = written_tokens(spec, model, tokenizer, vocab_size=tiny.VOCAB)
    assert rows[:, 0].tolist() == [tokenizer.bos_token_id] * 3
    assert not set(rows[:, 1].tolist()) & set(tokenizer.all_special_ids)
