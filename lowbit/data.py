"""Text and tokens: calibration batches and evaluation streams.

Sources, named by one string:
    FILE.txt                  UTF-8 text, one document
    FILE.jsonl                one JSON object a line, its field `text_key` is one document
    hf:DATASET[:CONFIG]       a dataset of the Hugging Face hub, one row is one document, streamed (needs `datasets`)
    random                    uniform random token ids, no text
    self                      text that the model itself writes

A token stream is `bos text eos bos text eos ...`. The boundary ids are put in here and never by the tokenizer (it is
called with add_special_tokens=False), each at most once: an id that the text itself already begins or ends with is not
doubled, and a tokenizer whose bos and eos are one id (GPT-2) gets that id before each document only. A tokenizer that
lacks an id gets none. Documents of white space alone are skipped.

Everything drawn depends on the seed, the source and the tokenizer alone, and the result carries its SHA-256.
"""

import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lowbit.arguments import shown
from lowbit.source import Source, in_short, read_json, refused_code

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Kind = Literal["random", "self", "hub", "txt", "jsonl"]

PASSAGE_CHARACTERS = 4096  # the least size of the passages into which calibration cuts long documents
ROWS, LENGTH = 128, 1024  # of calibration data, where nothing is said
WRITTEN_AT_ONCE = 16  # rows that a model writes in one batch
HUB_SHUFFLE_BUFFER = 4096  # documents held while a hub dataset is shuffled
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """Which tokens to calibrate on.

    Attributes:
        source: see the module docstring.
        rows: sequences to draw, at least 1; None stands for ROWS, or as many as the text has.
        length: tokens of each sequence, at least 2; None stands for LENGTH, or as many as the model and the text have.
        seed: order of the documents, or the random ids; 0 .. 2^63 - 1.
        text_key: field that holds the text (.jsonl and hub sources).
        split: split of a hub dataset.
    """

    source: str
    rows: int | None = None
    length: int | None = None
    seed: int = 0
    text_key: str = "text"
    split: str = "train"

    def __post_init__(self) -> None:
        _source_kind(self.source)
        for name, least in (("rows", 1), ("length", 2), ("seed", 0)):
            value = getattr(self, name)
            if value is None and name != "seed":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**63:
                raise ValueError(f"{name} = {shown(value)}: give a whole number of at least {least}")
        for name in ("text_key", "split"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value:
                raise ValueError(f"{name} = {shown(value)}: give a name that is not empty")

    @property
    def kind(self) -> Kind:
        """What the source is."""
        return _source_kind(self.source)

    @property
    def size(self) -> tuple[int, int]:
        """Rows and length, where nothing is said the usual ones."""
        return self.rows or ROWS, self.length or LENGTH

    def fitted(self, positions: int | None) -> "DataSpec":
        """The same with a length, which a model of so many positions can take.

        Raises:
            ValueError: the length was given and is larger.
        """
        if self.length is not None and positions is not None and self.length > positions:
            raise ValueError(
                f"length = {self.length}: the model has {positions} positions; use a length of at most {positions}"
            )
        return replace(self, length=self.length or min(LENGTH, positions or LENGTH))


@dataclass(frozen=True, kw_only=True, eq=False)
class Calibration:
    """Calibration tokens and where they came from.

    Attributes:
        tokens: [rows, length] int64, on the CPU, rows cut from one packed stream.
        sha256: of the tokens as little-endian int64, row by row.
        spec: what was asked for.
        documents: documents (passages of a .txt file) that the tokens hold, the last one perhaps in part; 0 for random.
        source_sha256: of the source file's bytes; None where the source is not a file.
        bos_id, eos_id: ids put before and after each document; None where none is.
    """

    tokens: Tensor
    sha256: str
    spec: DataSpec
    documents: int
    source_sha256: str | None
    bos_id: int | None
    eos_id: int | None

    def describe(self) -> dict[str, Any]:
        """A record for reports, JSON types only; a source file is named without its folder."""
        spec = self.spec
        return {
            "source": Path(spec.source).name if spec.kind in ("txt", "jsonl") else spec.source,
            "source_sha256": self.source_sha256,
            "text_key": spec.text_key if spec.kind in ("jsonl", "hub") else None,
            "split": spec.split if spec.kind == "hub" else None,
            "rows": len(self.tokens),
            "length": self.tokens.shape[1],
            "seed": spec.seed,
            "documents": self.documents,
            "bos_id": self.bos_id,
            "eos_id": self.eos_id,
            "tokens_sha256": self.sha256,
        }


def tokenizer_of(source: Source) -> Any:
    """The tokenizer of a checkpoint.

    Raises:
        ValueError: it has none, transformers cannot load it, or it is code of the folder, which is not trusted.
    """
    from transformers import AutoTokenizer

    folder, described = source.folder, source.folder / "tokenizer_config.json"
    settings = read_json(described, "the tokenizer's configuration") if described.exists() else {}
    if "auto_map" not in settings and not any((folder / name).exists() for name in _TOKENIZERS):
        raise ValueError(
            f"{folder} has no tokenizer ({', '.join(_TOKENIZERS)}), which text needs; add its files, or calibrate on random "
            "tokens with --data random"
        )
    try:
        found = AutoTokenizer.from_pretrained(folder, trust_remote_code=source.trust_remote_code)
    except MemoryError:
        raise
    except Exception as error:  # the library tokenizers raises plain Exception
        if not source.trust_remote_code and "trust_remote_code" in str(error):
            raise refused_code(described) from error
        raise ValueError(f"{folder} has no tokenizer that transformers can load: {in_short(error)}; fetch it again") from error
    if not isinstance(found.model_max_length, (int, float)):
        raise ValueError(f"{described}: model_max_length = {shown(found.model_max_length)}; allowed is a number of tokens")
    return found


def read_documents(spec: DataSpec) -> Iterator[str]:
    """The documents of a text source, in the order of the source, empty ones included.

    Raises:
        ValueError: a source without text (random), a file that is missing, empty, not UTF-8 or not valid JSON lines, a
            document without `text_key` or whose text is not a string (with its line), an unknown dataset or split.
        ImportError: a hub source without the library `datasets`.
    """
    if spec.kind in ("random", "self"):
        raise ValueError(f"source {spec.source!r} has no text: give a .txt file, a .jsonl file or hf:DATASET[:CONFIG]")
    if spec.kind == "hub":
        return _hub_documents(spec, _open_hub(spec))
    path = Path(spec.source)
    if not path.is_file():
        raise ValueError(f"source {spec.source!r} is not a file: check the path (relative paths start at {Path.cwd()})")
    return iter([_read_text(path)]) if spec.kind == "txt" else _jsonl_documents(path, spec.text_key)


def calibration_tokens(spec: DataSpec, tokenizer: "PreTrainedTokenizerBase | None", *, vocab_size: int) -> Calibration:
    """Draw `rows` sequences of `length` tokens.

    Documents are put in a seeded random order, encoded one by one until there are enough tokens, and packed end to end;
    the rest of the source is not encoded. A .txt file, being one document, is first cut into passages (`passages`) of
    about one row, which then count as documents. A hub dataset is shuffled within a buffer of HUB_SHUFFLE_BUFFER rows.
    `random` draws from the ids below vocab_size; with a tokenizer, only from those it has and that are not special. For
    `self` see `written_tokens`.

    Args:
        spec: what to draw; not self.
        tokenizer: of the model; None only for `random`.
        vocab_size: rows of the model's embedding; every id is below it.

    Raises:
        ValueError: no tokenizer, too little text, an id the model lacks, or what `read_documents` raises.
    """
    if vocab_size < 1:
        raise ValueError(f"vocab_size = {vocab_size}: give the number of rows of the model's embedding, at least 1")
    if spec.kind == "random":
        return without_documents(_random_tokens(spec, tokenizer, vocab_size), spec)
    if tokenizer is None:
        raise ValueError(
            f"source {spec.source!r} is text and there is no tokenizer: load the model's tokenizer "
            "(transformers.AutoTokenizer), or use source 'random'"
        )

    rows, length = spec.size
    needed = rows * length
    stream: list[int] = []
    documents = 0
    for text in _shuffled_documents(spec):
        if len(stream) >= needed:
            break
        ids = _encode_document(tokenizer, text)
        stream += ids
        documents += bool(ids)
    if spec.length is None and len(stream) >= 2:
        length = min(length, len(stream))
    if spec.rows is None and len(stream) >= length:
        rows = min(rows, len(stream) // length)
    needed = rows * length
    if len(stream) < needed:
        fewer = f"rows <= {len(stream) // length}, a shorter length" if len(stream) >= length else f"a length <= {len(stream)}"
        raise ValueError(
            f"source {spec.source!r} has {len(stream)} tokens in {documents} documents, but {rows} rows of {length} need "
            f"{needed}: use {fewer}, or more text"
        )
    tokens = torch.tensor(stream[:needed], dtype=torch.int64).reshape(rows, length)
    _check_ids(tokens, tokenizer, vocab_size)
    bos_id, eos_id = _boundary_ids(tokenizer)
    is_file = spec.kind in ("txt", "jsonl")
    return Calibration(
        tokens=tokens,
        sha256=_hash_tokens(tokens),
        spec=spec,
        documents=documents,
        source_sha256=hashlib.sha256(Path(spec.source).read_bytes()).hexdigest() if is_file else None,
        bos_id=bos_id,
        eos_id=eos_id,
    )


def without_documents(tokens: Tensor, spec: DataSpec) -> Calibration:
    """The record of tokens [rows, length] int64 that come from no text."""
    return Calibration(
        tokens=tokens, sha256=_hash_tokens(tokens), spec=spec, documents=0, source_sha256=None, bos_id=None, eos_id=None
    )


@torch.no_grad()
def written_tokens(
    spec: DataSpec, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase | None", *, vocab_size: int
) -> Tensor:
    """`rows` sequences of `length` tokens that a causal model writes, each from a random first token (after bos, if any).

    Tokens are drawn from the model's own distribution, as that is what it was trained on: LLM-QAT (Liu et al., 2023, section
    3.1) found this better than random tokens and than greedy text. eos does not end a row; what follows is a new text.

    Args:
        model: float, whole, on any device.
        tokenizer: of the model, for bos and the ids that are special; without it none are.

    Returns:
        int64 [rows, length], the same for the same seed on the same machine.
    """
    rows, length = spec.size
    first = _random_tokens(DataSpec(source="random", rows=rows, length=2, seed=spec.seed), tokenizer, vocab_size)[:, :1]
    bos = _boundary_ids(tokenizer)[0] if tokenizer is not None else None
    start = first if bos is None else torch.cat([torch.full_like(first, bos), first], 1)
    start = start[:, :length]
    written = []
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(spec.seed)
        for part in start.split(WRITTEN_AT_ONCE):
            part = part.to(model.device)
            more = length - part.shape[1]
            options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "eos_token_id": None}
            mask = torch.ones_like(part)
            write: Any = model.generate
            found = write(part, attention_mask=mask, max_new_tokens=more, pad_token_id=0, **options) if more else part
            written.append(found.cpu())
    return torch.cat(written)


def evaluation_tokens(
    source: str,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    text_key: str = "text",
    split: str = "test",
    join: str | None = None,
    limit: int | None = None,
) -> Tensor:
    """A source as one stream of tokens, in its own order.

    A .txt file is encoded as a single string with no special token. Documents of a .jsonl or hub source are encoded one
    by one as `bos text eos`. With `join` they are instead joined by that string (empty ones too) and encoded as a
    single string with no special token; for WikiText-2 and "\\n\\n" that is how most published perplexities are made.

    Args:
        source: see the module docstring; not random.
        tokenizer: of the model.
        text_key, split: as in `DataSpec`.
        join: text between documents, or None.
        limit: most tokens to return, at least 1; None for all.

    Returns:
        [n] int64 on the CPU.

    Raises:
        ValueError: what `read_documents` raises, a bad limit, or a source that encodes to nothing.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit = {limit}: give a number of tokens of at least 1, or None for all")
    spec = DataSpec(source=source, text_key=text_key, split=split)
    documents = read_documents(spec)
    stream: list[int] = []
    if spec.kind == "txt" or join is not None:
        stream = _encode(tokenizer, (join or "").join(documents))
    else:
        for text in documents:
            stream += _encode_document(tokenizer, text)
            if limit is not None and len(stream) >= limit:
                break
    if not stream:
        raise ValueError(f"source {shown(source)} encodes to no tokens: give a source with text")
    return torch.tensor(stream[:limit], dtype=torch.int64)


def passages(text: str, characters: int) -> list[str]:
    """Cut text into passages of at most `characters`, each as long as fits, without newlines at the ends.

    A passage ends at the last newline that fits, failing that at the last space, failing that anywhere. Passages of
    white space alone are left out.
    """
    pieces = []
    start = 0
    while start < len(text):
        end = start + characters
        if end < len(text):
            cut = text.rfind("\n", start + 1, end)
            if cut < 0:
                cut = text.rfind(" ", start + 1, end)
            end = cut + 1 if cut > 0 else end
        pieces.append(text[start:end].strip("\n"))
        start = end
    return [piece for piece in pieces if piece.strip()]


def _source_kind(source: str) -> Kind:
    allowed = "give a .txt file, a .jsonl file, hf:DATASET[:CONFIG], self or random"
    if not isinstance(source, str):
        raise ValueError(f"source = {shown(source)} is not a string: {allowed}")
    if source == "random":
        return "random"
    if source == "self":
        return "self"
    if source.startswith("hf:"):
        parts = source.split(":")[1:]
        if len(parts) > 2 or not all(parts):
            raise ValueError(f"source = {shown(source)} does not name a dataset: write hf:DATASET or hf:DATASET:CONFIG")
        return "hub"
    suffix = Path(source).suffix.lower()
    if suffix == ".txt":
        return "txt"
    if suffix == ".jsonl":
        return "jsonl"
    raise ValueError(f"source = {shown(source)} is of no known kind: {allowed}")


def _read_text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 at byte {error.start}: convert it to UTF-8") from error
    if not text.strip():
        raise ValueError(f"{path} holds no text: give a file with text")
    return text


def _jsonl_documents(path: Path, text_key: str) -> Iterator[str]:
    found = False
    with path.open("rb") as lines:  # bytes: lines end at \n alone, and a decoding error has a line number
        for number, raw in enumerate(lines, start=1):
            where = f"{path} line {number}"
            try:
                line = raw.decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise ValueError(f"{where} is not UTF-8: convert the file to UTF-8") from error
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where} is not valid JSON ({error}): write one JSON object a line") from error
            if not isinstance(record, dict):
                raise ValueError(f"{where} is a JSON {type(record).__name__}: write one JSON object a line")
            found = True
            yield _field(record, text_key, where)
    if not found:
        raise ValueError(f"{path} holds no documents: give a file with one JSON object a line")


def _open_hub(spec: DataSpec) -> Any:
    """The rows of a hub dataset: a streaming `datasets.IterableDataset`."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(
            f"source {spec.source!r} needs the library datasets ({error}): pip install 'lowbit[data]', or give a .jsonl"
        ) from error
    name, _, config = spec.source.removeprefix("hf:").partition(":")
    try:
        return load_dataset(name, config or None, split=spec.split, streaming=True)
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(
            f"source {spec.source!r} with split {spec.split!r} does not open ({error}): "
            "check the names of dataset, config and split"
        ) from error


def _hub_documents(spec: DataSpec, rows: Any) -> Iterator[str]:
    for number, record in enumerate(rows, start=1):
        yield _field(record, spec.text_key, f"{spec.source} split {spec.split!r} row {number}")


def _field(record: dict[str, Any], text_key: str, where: str) -> str:
    if text_key not in record:
        raise ValueError(f"{where} has no key {text_key!r}: set text_key to one of {sorted(record)}")
    text = record[text_key]
    if not isinstance(text, str):
        raise ValueError(
            f"{where}: key {text_key!r} holds a {type(text).__name__}, not a string: set text_key to a key with text"
        )
    return text


def _shuffled_documents(spec: DataSpec) -> Iterator[str]:
    if spec.kind == "hub":
        return _hub_documents(spec, _open_hub(spec).shuffle(seed=spec.seed, buffer_size=HUB_SHUFFLE_BUFFER))
    # English text has about 4 characters a token, so a passage fills about a row, and no long document fills many.
    size = max(PASSAGE_CHARACTERS, 4 * spec.size[1])
    documents = [passage for document in read_documents(spec) for passage in passages(document, size)]
    random.Random(spec.seed).shuffle(documents)
    return iter(documents)


def _boundary_ids(tokenizer: "PreTrainedTokenizerBase") -> tuple[int | None, int | None]:
    bos_id, eos_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    return bos_id, None if eos_id == bos_id else eos_id


def _encode(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    # verbose=False: no warning about texts longer than the model's context
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _encode_document(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    if not text.strip():
        return []
    bos_id, eos_id = _boundary_ids(tokenizer)
    ids = _encode(tokenizer, text)
    if bos_id is not None and ids[:1] != [bos_id]:
        ids.insert(0, bos_id)
    if eos_id is not None and ids[-1:] != [eos_id]:
        ids.append(eos_id)
    return ids


def _random_tokens(spec: DataSpec, tokenizer: "PreTrainedTokenizerBase | None", vocab_size: int) -> Tensor:
    allowed = torch.arange(vocab_size)
    if tokenizer is not None:
        special = set(tokenizer.all_special_ids)
        special |= {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        allowed = torch.tensor([i for i in range(min(vocab_size, len(tokenizer))) if i not in special])
        if not len(allowed):
            raise ValueError(f"vocab_size = {vocab_size} leaves special ids only: pass the model's vocabulary size")
    draw = torch.randint(len(allowed), spec.size, generator=torch.Generator().manual_seed(spec.seed))
    return allowed[draw]


def _check_ids(tokens: Tensor, tokenizer: "PreTrainedTokenizerBase", vocab_size: int) -> None:
    largest = int(tokens.max())
    if largest >= vocab_size:
        raise ValueError(
            f"the tokenizer gives id {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}), but the model has "
            f"vocab_size {vocab_size}: use the tokenizer of this model"
        )


def _hash_tokens(tokens: Tensor) -> str:
    return hashlib.sha256(tokens.contiguous().numpy().astype("<i8").tobytes()).hexdigest()
