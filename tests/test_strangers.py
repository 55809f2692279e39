"""Folders of strangers: their code is not run, nothing in them makes a command hang, and what is wrong is told in one line."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers

import lowbit
from lowbit import export
from lowbit.bench import bench
from lowbit.cli import main
from lowbit.data import DataSpec
from lowbit.run import drawn
from lowbit.source import open_source

ROOT = Path(__file__).resolve().parents[1]
QUANTIZE = ("--scheme", "w4a16-g32", "--data", "random", "--rows", "2", "--length", "16")
MARK = 'open("EXECUTED", "w").close()\n'
EVIL_CONFIG = MARK + "from transformers import PreTrainedConfig\nclass C(PreTrainedConfig): model_type = 'evil'\n"
EVIL_TOKENIZER = MARK + "from transformers import PreTrainedTokenizerFast\nclass T(PreTrainedTokenizerFast): pass\n"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama with a tokenizer, in one shard, to be read only."""
    folder = tmp_path_factory.mktemp("pristine") / "llama"
    tiny.save("llama", folder, dtype=torch.bfloat16, max_shard_size="1GB")
    tiny.save_tokenizer(folder)
    return folder


@pytest.fixture
def model(pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it to spoil; the working directory is beside it."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(pristine, tmp_path / "model"))


def change(path: Path, **values: Any) -> None:
    """Set keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def evil_config(model: Path) -> str:
    """A model type of its own, made by code; returns what the refusal names."""
    (model / "evil.py").write_text(EVIL_CONFIG)
    change(model / "config.json", model_type="evil", auto_map={"AutoConfig": "evil.C"})
    return "config.json"


def evil_tokenizer(model: Path) -> str:
    """A tokenizer made by code; returns what the refusal names."""
    (model / "evil.py").write_text(EVIL_TOKENIZER)
    change(model / "tokenizer_config.json", tokenizer_class="T", auto_map={"AutoTokenizer": [None, "evil.T"]})
    return "tokenizer_config.json"


def arguments_of(command: str, model: Path) -> list[str]:
    """A small run of a command on the model."""
    text = model.parent / "text.txt"
    text.write_text("\n".join(tiny.TEXT * 4))
    return {
        "quantize": ["quantize", str(model), "--out", "out", "--scheme", "w4a16-g32", "--method", "gptq"]
        + ["--data", str(text), "--rows", "2", "--length", "16"],
        "plan": ["plan", str(model), "--out", "p.toml", "--bits", "5", "--data", str(text), "--rows", "1", "--length", "8"],
        "eval": ["eval", str(model), "--data", str(text), "--window", "32"],
        "generate": ["generate", str(model), "--prompt", "The"],
    }[command]


# -------------------------------------------------------------------------------------------------------------- their code


@pytest.mark.parametrize("command", ["quantize", "plan", "eval", "generate"])
@pytest.mark.parametrize("spoil", [evil_config, evil_tokenizer])
def test_code_is_not_run(
    model: Path, spoil: Any, command: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Whoever says yes on standard input: nobody asks there."""
    named = spoil(model)
    arguments = arguments_of(command, model)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 100))
    assert main(arguments) == 2
    err = capfd.readouterr().err
    assert not Path("EXECUTED").exists() and not Path("out").exists()
    assert err.startswith("lowbit: ") and err.count("\n") == 1, err
    assert f"{named} asks for Python code" in err and "(evil." in err and "--trust-remote-code" in err
    assert sys.stdin.read(2) == "y\n"


def test_known_model_with_code_loads_without_it(model: Path) -> None:
    """transformers knows the type, so its own class is taken, and no one is asked."""
    (model / "evil.py").write_text(EVIL_CONFIG)
    change(model / "config.json", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"})
    change(model / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "evil.T"]})
    assert type(lowbit.load(str(model))) is transformers.LlamaForCausalLM
    assert main(arguments_of("eval", model)) == 0
    assert not Path("EXECUTED").exists()


@pytest.mark.slow
def test_yes_in_a_pipe(model: Path) -> None:
    """The same through a real standard input, as `yes | lowbit ...`."""
    evil_config(model)
    command = f"yes | {sys.executable} -m lowbit quantize model --out out {' '.join(QUANTIZE)}"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, shell=True, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--trust-remote-code" in done.stderr
    assert not Path("EXECUTED").exists()


OWN = """
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def forward(self, input_ids=None, use_cache=None, **kwargs):
        out = super().forward(input_ids=input_ids, use_cache=use_cache, **kwargs)
        out.logits = -out.logits
        return out

class OwnTokenizer(PreTrainedTokenizerFast):
    def __call__(self, text, *args, **kwargs):
        return super().__call__(text.upper(), *args, **kwargs)
"""


def own(model: Path) -> None:
    """Make it a model that only its own code can load, tokenizer included."""
    (model / "own.py").write_text(OWN)
    change(
        model / "config.json",
        model_type="own",
        architectures=["OwnForCausalLM"],
        auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"},
    )
    change(
        model / "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map={"AutoTokenizer": [None, "own.OwnTokenizer"]}
    )


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have transformers keep the code it copies here."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.mark.usefixtures("own_cache")
def test_trusted_code(model: Path, pristine: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """With the flag the model is quantized, loaded and used by its own code, which the output keeps."""
    own(model)
    assert main([*arguments_of("quantize", model), "--trust-remote-code"]) == 0, capfd.readouterr().err
    assert Path("out/own.py").read_text() == OWN
    with pytest.raises(ValueError, match="--trust-remote-code"):
        lowbit.load("out")
    loaded: Any = lowbit.load("out", trust_remote_code=True)
    assert type(loaded).__name__ == "OwnForCausalLM"
    plain: Any = lowbit.load(str(pristine))
    tokens = tiny.tokens(1, 16)
    agreement = torch.nn.functional.cosine_similarity(
        loaded(tokens).logits.flatten().float(), -plain(tokens).logits.flatten().float(), dim=0
    )
    assert agreement > 0.9
    for command in ("eval", "generate"):
        assert main([*arguments_of(command, Path("out").resolve()), "--trust-remote-code"]) == 0, capfd.readouterr().err
    told = capfd.readouterr().out
    assert "perplexity" in told and "THE" in told


@pytest.mark.slow
@pytest.mark.usefixtures("own_cache")
def test_trusted_code_in_other_processes(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranks of a parallel training and the processes of a comparison get the decision too."""
    own(model)
    monkeypatch.setenv("HF_HOME", str(model.parent / "home"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    spec = DataSpec(source="random", rows=8, length=16)
    options = {"mrem.steps": 4}
    given: dict[str, Any] = {"scheme": "w4a16-g32", "method": "rtn+mrem", "options": options, "data": spec}
    lowbit.quantize(str(model), "out", parallel=2, trust_remote_code=True, **given)
    assert Path("out/own.py").exists()
    arguments_of("eval", model)
    recipe = lowbit.recipe.short_recipe(scheme="w4a16-g32")
    result = lowbit.compare(
        str(model), {"a": recipe}, "compared", texts=["text.txt"], window=16, windows=1, trust_remote_code=True
    )
    assert "failed" not in result["rows"][0], result["rows"][0]


# ------------------------------------------------------------------------------------------------------------- bad input


def put(name: str, content: str) -> Any:
    """A file of the model with other content."""
    return lambda model: (model / name).write_text(content)


def config(**values: Any) -> Any:
    """config.json with other values."""
    return lambda model: change(model / "config.json", **values)


def pipe(name: str) -> Any:
    """A pipe in the place of a file."""

    def spoil(model: Path) -> None:
        (model / name).unlink(missing_ok=True)
        os.mkfifo(model / name)

    return spoil


DEEP = "[" * 50_000 + "]" * 50_000
TOML = '[[rules]]\nmatch = ""\nscheme = "w4a16-g32"\n[[steps]]\nmethod = "rtn"\n'
BAD_MODELS = {
    "config": (put("config.json", "{"), r"model/config\.json is not valid JSON"),
    "deep config": (put("config.json", DEEP), r"model/config\.json is not valid JSON"),
    "list": (put("config.json", "[]"), r"model/config\.json holds a list, not a JSON object"),
    "model type": (config(model_type=["llama"]), r"model/config\.json: transformers cannot read this config"),
    "unknown type": (config(model_type="x"), r"model/config\.json: transformers cannot read this config: .*`x`"),
    "text for a number": (config(hidden_size="64"), r"model/config\.json: .*hidden_size"),
    "activation": (config(hidden_act="x"), r"model/config\.json: transformers cannot make a model of this config"),
    "rope": (config(rope_parameters={"rope_type": "x"}), r"model/config\.json: .*"),
    "class": (config(architectures=["logging"]), r"model/config\.json: architectures = \['logging'\], which is no model"),
    "padding": (config(pad_token_id=10**6), r"model/config\.json: "),
    "layers": (config(num_hidden_layers=10**9), r"num_hidden_layers = 1000000000, but the weights are of 3 blocks"),
    "vocabulary": (config(vocab_size=10**9), r"vocab_size = 1000000000, but in model\.safetensors model\.embed"),
    "quantized": (config(quantization_config="x"), r"model is quantized already, but 'quantization_config' is 'x'"),
    "generation": (put("generation_config.json", "{"), r"model/generation_config\.json is not valid JSON"),
    "pipe": (pipe("generation_config.json"), r"model/generation_config\.json is a pipe, not a file"),
    "pipe as shard": (pipe("model.safetensors"), r"model/model\.safetensors is a pipe"),
    "pipe as tokenizer": (pipe("tokenizer.json"), r"model/tokenizer\.json is a pipe"),
    "tokenizer": (put("tokenizer.json", "{"), r"model has no tokenizer that transformers can load: .*; fetch it again"),
    "tokenizer of nothing": (put("tokenizer.json", "{}"), r"model has no tokenizer that transformers can load: "),
    "tokenizer, a list": (put("tokenizer.json", "[]"), r"model has no tokenizer that transformers can load: "),
    "deep tokenizer": (put("tokenizer.json", DEEP), r"model has no tokenizer that transformers can load: "),
    "tokenizer settings": (put("tokenizer_config.json", DEEP), r"model/tokenizer_config\.json is not valid JSON"),
    "length": (
        lambda model: change(model / "tokenizer_config.json", model_max_length="x"),
        r"model/tokenizer_config\.json: model_max_length = 'x'; allowed|has no tokenizer that transformers can load",
    ),
    "shard": (put("model.safetensors", "x" * 1000), r"model/model\.safetensors is truncated or not a safetensors file"),
    "index": (
        put("model.safetensors.index.json", '{"weight_map": {"x": "../x.safetensors"}}'),
        r"names the shard '\.\./x\.safetensors'; allowed are names of files in its folder",
    ),
    "link": (lambda model: (model / "x.txt").symlink_to("/etc/passwd"), r"model/x\.txt is a link to /etc/passwd, outside"),
    "own format": (put("lowbit.json", "{}"), r"model is quantized already \(it has lowbit\.json\)"),
}  # fmt: skip


def told(capfd: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr."""
    err = capfd.readouterr().err
    assert "Traceback" not in err and err.startswith("lowbit: ") and err.count("\n") == 1, err
    return err


@pytest.mark.parametrize("spoil", BAD_MODELS)
def test_bad_models(model: Path, spoil: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Refused before anything is written, in one line that names the file."""
    make, message = BAD_MODELS[spoil]
    make(model)
    assert main(arguments_of("quantize", model)) == 2
    assert re.search(message, told(capfd))
    assert not list(Path().glob("out*"))


BAD_RECIPES = {
    "rules": ("rules = 7\nsteps = []", r"bad\.toml: rules = 7; allowed is a list of tables, \[\[rules\]\]"),
    "steps": ("steps = 7\nrules = []", r"bad\.toml: steps = 7; allowed is a list of tables"),
    "a rule": ("rules = [7]", r"bad\.toml, \[\[rules\]\]: 7 is not a table"),
    "a step": ("steps = [7]", r"bad\.toml, \[\[steps\]\]: method is missing"),
    "deep": ("data = " + "[" * 5000 + "]" * 5000, r"recipe bad\.toml is not TOML|nested more than"),
    "deeper than allowed": (
        "data = " + "[" * 90 + "]" * 90,
        r"bad\.toml: values are nested more than 16 levels deep|not a table",
    ),
    "optional": (TOML.replace("[[steps]]", "optional = 3\n[[steps]]"), r"optional = 3; allowed are true and false"),
    "scheme": (TOML.replace('"w4a16-g32"', "4"), r"rule '' -> 4: match and scheme are texts"),
    "option": (TOML + "x = 1", r"rtn has no option 'x'"),
    "deep option": (TOML + "importance = " + "[" * 10 + "]" * 10, r"rtn: importance = \[.*\] is not a"),
    "format": ("format = ['x']\n" + TOML, r"unknown format \['x'\]"),
    "expression": (TOML.replace('match = ""', f'match = "{"(" * 5000}"'), r"is not a regular expression"),
}


@pytest.mark.parametrize("name", BAD_RECIPES)
def test_bad_recipes(pristine: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    text, message = BAD_RECIPES[name]
    monkeypatch.chdir(tmp_path)
    Path("bad.toml").write_text(text)
    assert main(["quantize", str(pristine), "--out", "out", "--recipe", "bad.toml"]) == 2
    err = told(capfd)
    assert re.search(message, err) and len(err) < 1000
    assert not list(Path().glob("out*"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ignore": 0.5}, r"ignore = 0\.5; allowed is a list, each a text or None"),
        ({"ignore": "lm_head"}, r"ignore = 'lm_head'; allowed is a list"),
        ({"ignore": [3]}, r"ignore = \[3\]; allowed is a list, each a text"),
        ({"method": 3}, r"method = 3; allowed is a text"),
        ({"options": [1]}, r"options = \[1\]; allowed is a dict or None"),
        ({"options": "x"}, r"options = 'x'; allowed is a dict or None"),
        ({"options": {1: 2}}, r"options = \{1: 2\}; allowed is a dict"),
        ({"overwrite": 1}, r"overwrite = 1; allowed is True or False"),
        ({"parallel": True}, r"parallel = True; allowed is a whole number"),
        ({"model": [1]}, r"model = \[1\]; allowed is a text or a path"),
        ({"data": 3}, r"data = 3; allowed is a DataSpec or a text or None"),
        ({"progress": "x"}, r"progress = 'x'; allowed is what can be called or None"),
        ({"scheme": 4}, r"scheme = 4; allowed is a text"),
        ({"device": "meta"}, r"device 'meta' cannot be used: it has no memory; allowed are cpu"),
        ({"device": -0.5}, r"device = -0\.5; allowed is a text"),
    ],
)
def test_bad_arguments(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lowbit.quantize(**{"model": "model", "out": "out", "scheme": "w4a16", **given})


@pytest.mark.parametrize(
    ("device", "message"),
    [
        (-0.5, "-0.5"),
        (True, "True"),
        ({}, r"\{\}"),
        (None, "None"),
        (" ", "' ' cannot be used: Invalid device string"),
        (1e308, r"1e\+308"),
        ("meta", "'meta' cannot be used: it has no memory"),
        ("x", "'x' cannot be used: Expected one of"),
    ],
)
def test_bad_devices(pristine: Path, device: Any, message: str) -> None:
    """The same everywhere, and before any work."""
    name = str(pristine)
    doors: dict[str, Any] = {
        "quantize": lambda: lowbit.quantize(name, "out", scheme="w4a16-g32", device=device),
        "load": lambda: lowbit.load(name, device=device),
        "plain load": lambda: export.load(name, device=device),
        "plan": lambda: lowbit.plan(name, bits=5, data="random", device=device),
        "bench": lambda: bench([name], device=device),
        "model": lambda: lowbit.Arch(open_source(name), device=device),
    }
    if device is not None:  # which is that of the model there
        doors["evaluate"] = lambda: lowbit.evaluate(lowbit.load(name), tiny.tokens(1, 16)[0], window=8, device=device)
    for call in doors.values():
        with pytest.raises(ValueError, match=f"device(?: =)? {message}.*allowed"):
            call()
    assert not Path("out.partial").exists()


BAD_CALLS: dict[str, tuple[Any, str]] = {
    "load a list": (lambda m: lowbit.load([1]), r"model = \[1\]; allowed is a text or a path"),
    "dtype": (lambda m: lowbit.load(m, dtype=" "), r"dtype = ' '; allowed is a dtype or None"),
    "schemes": (lambda m: lowbit.plan(m, bits=5, data="random", schemes=False), r"schemes = False; allowed is a list"),
    "effort": (lambda m: lowbit.plan(m, bits=5, data="random", effort="float32"), r"effort = 'float32'; allowed is a Effort"),
    "a dict": (lambda m: lowbit.plan(m, bits=5, data="random", ignore={"a": 1}), r"ignore = \{'a': 1\}; allowed is a list"),
    "model": (lambda m: lowbit.evaluate(1, torch.ones(9)), r"model = 1; allowed is what can be called"),
    "tokens": (lambda m: lowbit.evaluate(print, -1), r"tokens = -1; allowed is a Tensor"),
    "stride": (lambda m: lowbit.evaluate(print, torch.ones(9), stride={"a": 1}), r"stride = \{'a': 1\}; allowed is a whole"),
    "progress": (lambda m: lowbit.evaluate(print, torch.ones(9), progress=3.5), r"progress = 3\.5; allowed is what can be"),
    "recipes": (lambda m: lowbit.compare(m, 7, "out", texts=["a.txt"]), r"recipes = 7; allowed is a dict"),
    "nothing to decide": (
        lambda m: lowbit.plan(m, bits=5, data="random", rows=1, length=8, ignore=["."]),
        r"--ignore leaves nothing to decide about; ignore fewer linears",
    ),
    "no prompt": (lambda m: bench([m], prompt=0), r"prompt = 0; allowed are whole numbers from 1 on"),
    "no batches": (lambda m: bench([m], batches=()), r"batches = 0; allowed are whole numbers"),
    "no models": (lambda m: bench([]), r"models = \[\]; give at least one"),
    "tokens without end": (
        lambda m: drawn(DataSpec(source="random", rows=16, length=10**12), open_source(m)),
        r"16 rows of 1000000000000 tokens take 3\.84e\+05 GB, but .* GB of memory are available; use fewer or shorter rows",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls(pristine: Path, name: str) -> None:
    call, message = BAD_CALLS[name]
    with pytest.raises(ValueError, match=message):
        call(str(pristine))


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1])
def test_bad_seed_of_generation(pristine: Path, seed: int, capfd: Any) -> None:
    assert main(["generate", str(pristine), "--prompt", "The", f"--seed={seed}"]) == 2
    assert f"--seed {seed}: allowed are whole numbers from -2^63 to 2^64 - 1" in told(capfd)


def test_root_is_no_model(capfd: Any) -> None:
    """Told at once, not after a walk through all folders of the machine."""
    assert main(["bench", "/"]) == 2
    assert "/config.json is missing" in told(capfd)


@pytest.mark.parametrize("deep", [DEEP, '{"text": ' + DEEP + "}"])
def test_bad_data(pristine: Path, tmp_path: Path, deep: str, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.jsonl").write_text('{"text": "a"}\n' + deep)
    assert (
        main(["quantize", str(pristine), "--out", "out", "--scheme", "w4a16-g32", "--method", "gptq", "--data", "bad.jsonl"])
        == 2
    )
    assert "bad.jsonl line 2 is not valid JSON" in told(capfd)


@pytest.mark.parametrize("command", ["quantize", "plan", "compare"])
def test_long_names_of_outputs(pristine: Path, tmp_path: Path, command: str, monkeypatch: Any, capfd: Any) -> None:
    monkeypatch.chdir(tmp_path)
    name = "x" * 300
    arguments = {
        "quantize": ["quantize", str(pristine), "--out", name, "--scheme", "w4a16-g32"],
        "plan": ["plan", str(pristine), "--out", name, "--bits", "4", "--data", "random"],
        "compare": ["compare", str(pristine), "--out", name, "--recipes", "a.toml", "--text", "a.txt"],
    }[command]
    Path("a.toml").write_text(TOML)
    assert main(arguments) == 2
    assert re.search(r"x{40}\.\.\. has 300 bytes; allowed are names of at most 240", told(capfd))


@pytest.mark.parametrize(
    ("decisions", "message"),
    [
        (7, r"decisions = 7; allowed is an object"),
        ({"a": 7}, r"decision 'a' has cost = None"),
        (
            {"a": {"cost": {"w4a16-g32": "x"}}},
            r"decision 'a' has cost = \{'w4a16-g32': 'x'\}; allowed is an object with a number",
        ),
        ({"a": {"cost": {}}}, r"decision 'a' has cost = \{\}"),
        ({"a": {"cost": {"float": float("nan")}}}, r"decision 'a' has cost = \{'float': nan\}"),
        ({"a": {"cost": {"fp8": 1.0}}}, r"decision 'a' has cost = \{'fp8': 1\.0\}"),
        (
            {"a": {"cost": {"float": 0.0}, "linears": [-0.5]}},
            r"decision 'a' has linears = \[-0\.5\]; allowed is a list of names",
        ),
        ({"a": {"cost": {"float": 0.0}, "linears": []}}, r"decision 'a' has linears = \[\]"),
        ({"a": {"cost": {"float": 0.0}, "linears": ["a"], "block": "0"}}, r"decision 'a' has block = '0'; allowed is a whole"),
    ],
)
def test_bad_sensitivities(model: Path, decisions: Any, message: str, capfd: Any) -> None:
    """A person may edit the file."""
    given = ["plan", str(model), "--out", "p.toml", "--bits", "5", "--data", "random", "--rows", "1", "--length", "8"]
    given += ["--signal", "fisher", "--method", "rtn", "--schemes", "w4a16-g32", "w8a16-g32"]
    measured = Path("p.sensitivities.json")
    if not measured.exists():
        assert main(given) == 0
        Path("p.toml").unlink()
    change(measured, decisions=decisions)
    capfd.readouterr()
    assert main(given) == 2
    assert re.search(r"p\.sensitivities\.json: " + message, told(capfd))


@pytest.mark.parametrize(("flag", "value"), [("--bits", "nan"), ("--bits", "-1"), ("--max-ppl-ratio", "inf"), ("--bits", "0")])
def test_bad_goals(pristine: Path, flag: str, value: str, capfd: Any) -> None:
    name = flag.removeprefix("--").replace("-", "_")
    assert main(["plan", str(pristine), "--out", "p.toml", f"{flag}={value}", "--data", "random"]) == 2
    assert f"{name} = {float(value)}: give a number above 0" in told(capfd)
